"""The analysis as one page that opens in a browser with no network: tables, and the figures inside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence

from lora_lightning.analysis.tables import Rows

CSS = """
:root { color-scheme: light dark; --line: #8884; --soft: #777; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
p { max-width: 46rem; } .soft { color: var(--soft); white-space: pre-line; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem .15rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
figure { margin: 1rem 0; } figure img { width: 100%; max-width: 56rem; background: white; border-radius: 4px; }
figcaption { color: var(--soft); font-size: 13px; max-width: 46rem; }
details summary { cursor: pointer; margin: 1rem 0 .4rem; font-weight: 600; }
"""

TITLE = "The rank that is used"
INTRO = """An adapted layer computes h = W0 x + s B A x. Told here is what the update s B A is made of, by the measures
of section 7 of the paper (Hu et al. 2021, arXiv 2106.09685): how many directions hold its energy, ||s B A||_F squared;
how much larger it is than W0 in those directions (amplification); and which directions two adapters share (phi, from 0
to 1)."""


def page(
    tables: Sequence[Rows],
    long: Sequence[Rows],
    figures: Mapping[str, tuple[str, bytes]],
    *,
    title: str = TITLE,
    intro: str = INTRO,
) -> bytes:
    """One HTML file.

    Args:
        tables: shown at once.
        long: folded away until they are asked for.
        figures: by title, a caption and an SVG.
        title: of the page.
        intro: what a reader is to know first.
    """
    parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p>"]
    parts += [f"<h2>{html.escape(rows.title)}</h2>{_table(rows)}" for rows in tables]
    parts += [_figure(name, caption, svg) for name, (caption, svg) in figures.items()]
    parts += [f"<details><summary>{html.escape(t.title)}</summary>{_table(t)}</details>" for t in long]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    body = "".join(parts)
    text = f'<!doctype html><html lang="en"><head>{head}<style>{CSS}</style></head><body>{body}</body></html>\n'
    return text.encode()


def _table(rows: Rows) -> str:
    header = "".join(f"<th>{html.escape(name)}</th>" for name in rows.header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows.rows)
    below = f'<p class="soft">{html.escape(rows.below)}</p>' if rows.below else ""
    return f'<div class="wide"><table><tr>{header}</tr>{body}</table></div>{below}'


def _figure(title: str, caption: str, svg: bytes) -> str:
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    return (
        f'<h2>{html.escape(title)}</h2><figure><img alt="{html.escape(title)}" src="{source}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
