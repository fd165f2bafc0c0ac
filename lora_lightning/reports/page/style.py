"""How the page looks, on a desk and on a phone, by day and by night."""

# Colours of lines are told apart by people with any of the common kinds of colour blindness (Okabe and Ito), and have a
# contrast of 3 to 1 or more with the ground that they are drawn on.
STYLE = """
:root { color-scheme: light dark; --ground: #fafaf8; --card: #ffffff; --ink: #1c1d1f; --soft: #5c6066; --edge: #e3e3de;
  --good: #0b6e4f; --bad: #b3261e; --c-train: #0067b1; --c-val: #c4500c; --c-test: #00795a; --c0: #0067b1;
  --c1: #c4500c; --c2: #00795a; --c3: #a8458a; --c4: #7a6000; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #131416; --card: #1c1e21; --ink: #ecece8; --soft: #a3a7ad; --edge: #313439; --good: #5cc9a0;
    --bad: #ff8a80; --c-train: #6db8f0; --c-val: #f0905a; --c-test: #4fc9a2; --c0: #6db8f0; --c1: #f0905a;
    --c2: #4fc9a2; --c3: #de8fc4; --c4: #d8bc4e; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h1 span { color: var(--soft); font-weight: 400; }
h2 { font-size: 18px; margin: 36px 0 12px; }
p { margin: 0 0 8px; max-width: 78ch; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.badges { display: flex; flex-wrap: wrap; gap: 8px; margin: 14px 0 0; padding: 0; list-style: none; }
.badges li { border: 1px solid currentColor; border-radius: 999px; padding: 2px 12px; font-size: 13.5px; }
.good { color: var(--good); } .bad { color: var(--bad); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin: 22px 0 0; }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 12px 14px; margin: 0; }
.card dt { color: var(--soft); font-size: 13px; }
.card dd { margin: 2px 0 0; font-size: 22px; font-weight: 600; line-height: 1.25; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.card dd + dd { font-size: 13px; font-weight: 400; color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); gap: 14px; }
.chart { margin: 0; background: var(--card); border: 1px solid var(--edge); border-radius: 10px;
  padding: 12px 12px 8px; }
figcaption { font-weight: 600; margin: 0 0 4px 4px; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
.grid path { stroke: var(--edge); stroke-width: 1; fill: none; }
.grid text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.line path { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.line circle { fill: currentColor; stroke: transparent; stroke-width: 9; pointer-events: all; }
.faint path { stroke-width: 1; } g.faint { opacity: 0.5; } i.faint { opacity: 0.5; }
.train { color: var(--c-train); } .val { color: var(--c-val); } .test { color: var(--c-test); }
.line0 { color: var(--c0); } .line1 { color: var(--c1); } .line2 { color: var(--c2); } .line3 { color: var(--c3); }
.line4 { color: var(--c4); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 2px 4px 4px; padding: 0;
  font-size: 13px; color: var(--soft); font-variant-numeric: tabular-nums; }
.legend b { color: var(--ink); font-weight: 600; }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; background: currentColor;
  margin-right: 6px; vertical-align: middle; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--edge); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 14px; border-top: 1px solid var(--edge); vertical-align: top; }
thead th { border-top: 0; color: var(--soft); font-weight: 500; font-size: 13px; white-space: nowrap; }
tbody tr:first-child > * { border-top: 0; }
thead + tbody tr:first-child > * { border-top: 1px solid var(--edge); }
tbody th { font-weight: 500; }
.facts th { width: 1%; min-width: 120px; padding-right: 28px; white-space: nowrap; }
.facts td { overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 180px; }
.name { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13px; }
td.name { overflow-wrap: anywhere; min-width: 150px; }
.best { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
details { margin-top: 14px; } summary { cursor: pointer; font-weight: 600; }
details > * + * { margin-top: 10px; }
pre { margin: 10px 0 0; padding: 14px; background: var(--card); border: 1px solid var(--edge); border-radius: 10px;
  overflow-x: auto; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
footer { margin-top: 40px; color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
@media (max-width: 560px) { main { padding: 20px 14px 36px; } h1 { font-size: 23px; }
  .cards { grid-template-columns: 1fr 1fr; gap: 10px; } .card dd { font-size: 19px; } th, td { padding: 7px 10px; }
  .facts th { white-space: normal; padding-right: 12px; } }
@media print { .chart, .card { break-inside: avoid; } }
"""
