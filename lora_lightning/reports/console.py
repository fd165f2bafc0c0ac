"""What a person sees: the first screen of a run and the table that closes it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lora_lightning.lora.formats.atomic_dir import human_size
from lora_lightning.lora.kept import KEPT
from lora_lightning.lora.report import InjectionReport

BEFORE = "_before"
"""Ends the name of a figure from before training."""


ROWS = 7
"""Of the injection table on the first screen, which with what stands around it is to have at most 15 lines."""


def injection_table(report: InjectionReport) -> Table:
    """The grouped injection table, blocks folded into one row each, and what is too much into a last one."""
    table = Table(caption_justify="left", box=None, padding=(0, 1, 0, 0))
    header, *lines = report.shown()
    for name in header:
        table.add_column(name, justify="left" if name in ("module", "kind") else "right", overflow="ellipsis")
    for line in lines if len(lines) <= ROWS else folded(header, lines):
        table.add_row(*line)
    table.caption = f"{report.trainable:,} of {report.total:,} parameters train ({report.share:.2%})"
    return table


def folded(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The first rows, and one for the others: how many modules and parameters they are."""
    first, rest = lines[: ROWS - 1], lines[ROWS - 1 :]
    sums = {name: sum(int(line[header.index(name)].replace(",", "") or 0) for line in rest) for name in TOTALS}
    told = {"module": f"... {len(rest)} more rows, all in the run's page", **{k: f"{n:,}" for k, n in sums.items()}}
    return [*first, tuple(told.get(name, "") for name in header)]


TOTALS = ("count", "parameters")


def show_run(lines: Iterable[str], console: Console) -> None:
    """The first lines of a run's first screen: what is adapted, on what, and where results go."""
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


MOST_LABELS = 12
"""Labels that the box of the data names, each with its rows."""


def show_data(summary: dict[str, Any] | None, console: Console) -> None:
    """A box with what the rows tell before the first step, and a line for each thing that looks wrong."""
    if not summary:
        return
    lines = ["rows: " + ", ".join(f"{split} {count:,}" for split, count in summary["rows"].items())]
    for split, counts in summary.get("labels", {}).items():
        if len(counts) > MOST_LABELS:
            told = f"{len(counts)}, of {min(counts.values()):,} to {max(counts.values()):,} rows"
        else:
            told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        lines.append(f"labels in {split}: {told}")
    if cut := summary.get("cut"):
        lines.append("cut at max_length: " + ", ".join(f"{share:.1%} of {split}" for split, share in cut.items()))
    text = Text("\n".join(lines))
    for warning in summary.get("warnings", ()):
        text.append(f"\nwarning: {warning}", style="yellow")
    console.print(Panel(text, title="data", title_align="left", expand=False))


def show_injection(report: InjectionReport, console: Console) -> None:
    """The rest of it: the injection table, and a line on what was left out."""
    console.print(injection_table(report))
    for line in report.left_out():
        console.print(line, soft_wrap=True)


def show_report(values: dict[str, Any], console: Console, save_svg: Path | None = None) -> None:
    """Print all that is known of a run as one table; also as a picture where a file is named."""
    table = report_table(values)
    console.print(table)
    if save_svg is not None:
        recorder = Console(record=True, width=92, file=io.StringIO())
        recorder.print(table)
        # The fonts that rich names would be fetched from the network; a reader's own monospace font does.
        picture = re.sub(r"@font-face \{.*?\}\s*", "", recorder.export_svg(title="lora-lightning"), flags=re.S)
        save_svg.write_text(picture, encoding="utf-8")


def report_table(values: dict[str, Any]) -> Table:
    """The closing table: one fact a row, in the order in which a reader asks."""
    table = Table(
        title=f"Run {values.get('run_dir', '')}",
        title_justify="left",
        show_header=False,
        box=None,
        padding=(0, 3, 0, 0),
    )
    table.add_column("what", style="bold", no_wrap=True)
    table.add_column("figure", overflow="fold")
    for name, text in report_rows(values):
        table.add_row(name, text)
    return table


def report_rows(v: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the closing table, for the facts that are known."""
    rows = [_accuracies(v, "LoRA", "val_accuracy", "test_accuracy")]
    rows.append(_accuracies(v, "linear probe", "probe_accuracy", "probe_test_accuracy"))
    rows.append(_accuracies(v, "raw pixels", "pixels_accuracy", "pixels_test_accuracy"))
    rows.append(_accuracies(v, "majority class", "majority_accuracy", "majority_test_accuracy"))
    other = {"val_accuracy", "test_accuracy"}
    rows += [
        (k.replace("_", " ", 1), f"{x:.4f}{_before(v, k, '.4f')}")
        for k, x in v.items()
        if k.startswith(("val_", "test_")) and k not in other and not k.endswith(BEFORE) and isinstance(x, float)
    ]
    if "test_rows" in v:
        rows.append(("rows tested", f"{v['test_rows']:,} of {v['test_data']}"))
    if "trainable" in v:
        rows.append(
            ("trainable parameters", f"{v['trainable']:,} of {v['total']:,} ({v['trainable'] / v['total']:.2%})")
        )
    if v.get("w0_before"):
        verdict = "unchanged" if v.get("w0_unchanged") else "MOVED"
        rows.append(("W0 before, after", f"{v['w0_before'][:8]}, {v['w0_after'][:8]}: {verdict}"))
    if v.get("adapter_bytes") and v.get("full_checkpoint_bytes"):
        ratio = v["full_checkpoint_bytes"] / v["adapter_bytes"]
        size = f"{human_size(v['adapter_bytes'])} beside {human_size(v['full_checkpoint_bytes'])}"
        rows.append(("adapter beside full model", f"{size} ({ratio:.0f} to 1)"))
    rows += _export_rows(v)
    if "train_seconds" in v:
        rows.append(("time of fit", f"{v['train_seconds']:.0f} s in {v.get('precision', '')}"))
    for key, name in (
        ("adapter_dir", "adapter (PEFT)"),
        ("merged_dir", "merged model"),
        ("checkpoint", "checkpoint"),
        ("page", "page of the run"),
    ):
        if v.get(key):
            rows.append((name, str(v[key])))
    return [row for row in rows if row[1]]


def _accuracies(v: dict[str, Any], name: str, validation: str, test: str) -> tuple[str, str]:
    both = (("validation", validation), ("test", test))
    parts = [f"{label} {v[key]:.1%}{_before(v, key, '.1%')}" for label, key in both if key in v]
    return f"accuracy, {name}", ", ".join(parts)


def _before(v: dict[str, Any], key: str, form: str) -> str:
    """What the same figure was before training, where `MeasureBefore` has measured it."""
    before = v.get(f"{key}{BEFORE}")
    return f" ({before:{form}} before)" if isinstance(before, float) else ""


def _export_rows(v: dict[str, Any]) -> list[tuple[str, str]]:
    """How near the exported files are to what was trained."""
    rows = []
    if "export_max_rel_diff" in v:
        merged = "merged" in v.get("export_formats", ["merged"])
        rule = str(v.get("export_rule", ""))
        limit = f"{v.get('export_tolerance', 0.0):.0e}{' ' if rule.startswith(('in', 'for')) else ', '}{rule}"
        what = "merged against adapted" if merged else "adapter read back"
        rows.append((what, f"{v['export_max_rel_diff']:.1e} relative (allowed {limit})"))
    if v.get("merged_dir") and v.get("merged_bytes"):
        files = v.get("export_files", 1)
        split = f" in {files} files" if files > 1 else ""
        rows.append(("merged weights", f"{v.get('export_dtype')}, {human_size(v['merged_bytes'])}{split}"))
    if v.get("merged_dir") and v.get("export_kept_least", 1.0) < 0.9995:
        low = f"{v['export_kept_low']} of {v['export_layers']} layers below {KEPT:.0%}"
        rows.append(("update kept by rounding", f"at least {v['export_kept_least']:.1%} ({low})"))
    if v.get("merged_dir") and v.get("export_dequantised"):
        rows.append(("dequantised", f"{v['export_dequantised']} layers, plain in the merged model"))
    return rows
