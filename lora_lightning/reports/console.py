"""The screens of a run: what is adapted, on what and in which dtypes, the data, and the table that closes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lora_lightning.lora.formats.atomic_dir import human_size
from lora_lightning.lora.frozen.dtype import base_dtypes, dtype_name
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.inject import adapted_layers, modules_of_kind
from lora_lightning.lora.layers import SavedCopy
from lora_lightning.lora.layers.class_swap import Grafted
from lora_lightning.lora.report import LEAST_KEPT, InjectionReport
from lora_lightning.reports.table import Table

BEFORE = "_before"
"""Suffix of a metric's name from before training."""


# ---- the first screen


def show_lines(lines: Iterable[str], console: Console) -> None:
    """Print lines without markup, and without line breaks, so that paths can be copied."""
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


MOST_LABELS = 12
"""Labels up to which the box of the data names each with its rows."""


def show_data(summary: dict[str, Any] | None, console: Console) -> None:
    """Print a box with the data's summary, and a line for each warning."""
    if not summary:
        return
    lines = ["rows: " + ", ".join(f"{split} {count:,}" for split, count in summary["rows"].items())]
    for split, counts in summary.get("labels", {}).items():
        counted = ", ".join(f"{quote_label(name)} {count:,}" for name, count in counts.items())
        if len(counts) > MOST_LABELS:
            counted = f"{len(counts)}, of {min(counts.values()):,} to {max(counts.values()):,} rows"
        lines.append(f"labels in {split}: {counted}")
    for what, shares in cut_shares_by_kind(summary).items():
        lines.append(f"{what}: " + ", ".join(f"{share:.1%} of {split}" for split, share in shares.items()))
    text = Text("\n".join(lines))
    for warning in summary.get("warnings", ()):
        text.append(f"\nwarning: {warning}", style="yellow")
    console.print(Panel(text, title="data", title_align="left", expand=False))


def show_injection(report: InjectionReport, console: Console) -> None:
    """Print the injection table, blocks folded into one row each, and what was left out."""
    header, *rows = report.table()
    text = [i for i, name in enumerate(header) if name in ("module", "kind")]
    note = f"{report.trainable:,} of {report.total:,} parameters train ({report.share:.2%})"
    console.print(Table(header=header, rows=rows, text=text, note=note))
    show_lines(report.exclusions(), console)


def adapted_rows(report: InjectionReport) -> list[dict[str, Any]]:
    """The grouped injection table as plain data, one mapping of its columns a row."""
    header, *lines = report.table()
    return [dict(zip(header, line, strict=True)) for line in lines]


def first_lines(trainer: Trainer, backbone: nn.Module, report: InjectionReport, folder: Path | None) -> list[str]:
    """Backbone and size; device, precision and processes; where results go."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    where = f"{trainer.world_size} x {name}" if trainer.world_size > 1 else name
    others = [_place(logger) for logger in trainer.loggers if not isinstance(logger, CSVLogger)]
    folders = "nowhere" if folder is None else f"{folder} and {', '.join(others)}" if others else str(folder)
    return [
        f"{backbone_name(backbone)}, {short_count(report.frozen)} frozen parameters",
        f"on {where} in {trainer.precision}; results go to {folders}",
    ]


def _place(logger: Logger) -> str:
    """Where this logger's results are."""
    if not isinstance(logger, WandbLogger):
        return type(logger).__name__
    return f"W&B (wandb sync {Path(logger.experiment.dir).parent})" if logger.experiment.offline else "W&B"


def backbone_name(backbone: nn.Module) -> str:
    """The backbone's class, and the source of its weights if known: a hub name, or a path's last two parts."""
    kind = type(backbone)
    while issubclass(kind, Grafted) or FSDPModule in kind.__bases__:
        kind = kind.grafted_from[0] if issubclass(kind, Grafted) else kind.__bases__[1]  # fully_shard's class is first
    name = kind.__name__
    config = getattr(backbone, "config", None)
    source = getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None)
    if not isinstance(source, str) or not source:
        return name
    return f"{name} ({'/'.join(PurePath(source.replace('package:', '')).parts[-2:])})"


def short_count(number: int) -> str:
    """A number of parameters in short form: 22.7M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size * 0.9995:
            return f"{number / size:.3g}{unit}"
    return str(number)


# ---- which dtype each part of a run has, and which mode the backbone is in


def part_dtypes(backbone: nn.Module, backbone_mode: str, trainer: Trainer) -> dict[str, Any]:
    """The dtypes of a module that a trainer has set up, by part, as a run's report has them.

    Returns:
        `w0`, the number of its values by dtype or quantization, the largest first; `adapter`, the dtypes of what else
        trains; `saved`, those of each module of `modules_to_save`; `autocast`, None without it; the Trainer's
        `precision`, and the word that was `asked` for where it is another one; `backbone_mode`; LoRA's `dropout`,
        which is on in training in both modes.
    """
    chosen, precision = getattr(trainer, "precision_asked", None), str(trainer.precision)
    copies = modules_of_kind(backbone, SavedCopy)
    heads = {id(t) for _, saved in copies for t in saved.lora_copy.parameters()}
    factors = [t for t in adapter_tensors(backbone).values() if id(t) not in heads and t.is_floating_point()]
    kind = trainer.strategy.root_device.type
    with trainer.precision_plugin.forward_context():
        autocast = dtype_name(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
    return {
        "w0": base_dtypes(backbone),
        "adapter": _dtypes(factors),
        "saved": {name: _dtypes(saved.lora_copy.parameters()) for name, saved in copies},
        "autocast": autocast,
        "precision": precision,
        "asked": None if chosen is None or str(chosen) in (precision, precision.partition("-")[0]) else str(chosen),
        "backbone_mode": backbone_mode,
        "dropout": sorted({layer.lora_settings.dropout for _, layer in adapted_layers(backbone)} - {0.0}),
    }


def dtype_lines(parts: Mapping[str, Any]) -> tuple[str, str]:
    """The result of `part_dtypes` in two lines of text: dtypes, and modes."""
    w0, mode, asked = parts["w0"], parts["backbone_mode"], parts["asked"]
    total = max(1, sum(w0.values()))
    shares = [name if len(w0) == 1 else f"{name} {_percent(n / total)}" for name, n in w0.items()]
    dtypes_of = [f"W0 {', '.join(shares)}", f"A and B {', '.join(parts['adapter'])}"]
    dtypes_of += [f"{name} {', '.join(dtypes)}" for name, dtypes in parts["saved"].items()]
    dtypes_of.append(f"{parts['autocast']} autocast" if parts["autocast"] else "no autocast")
    cpu = ", which CPUs do not have" if asked in ("16-mixed", "16") else ""
    dropout = "off" if mode == "eval" else "on"
    ours = f", LoRA's {' and '.join(f'{p:g}' for p in parts['dropout'])} on" if parts["dropout"] else ""
    return (
        f"dtypes: {'; '.join(dtypes_of)} (precision {parts['precision']}{f', for {asked}{cpu}' if asked else ''})",
        f"modes: the backbone in {mode} (backbone_mode): its own dropout {dropout}{ours}",
    )


def _dtypes(tensors: Iterable[torch.Tensor]) -> list[str]:
    return sorted({dtype_name(tensor.dtype) for tensor in tensors})


def _percent(share: float) -> str:
    return f"{share:.0%}" if 0.01 <= share <= 0.99 else f"{share:.2%}"


# ---- the data


def quote_label(name: str) -> str:
    """The name, in quotes where blanks would not be visible."""
    return name if name and name == name.strip() else repr(name)


def cut_shares_by_kind(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The share by split of `texts cut`, `sources cut` and so on."""
    by_kind: dict[str, dict[str, float]] = {}
    for split, shares in summary.get("cut", {}).items():
        for what, share in shares.items():
            by_kind.setdefault(what, {})[split] = share
    return by_kind


def data_table(summary: Mapping[str, Any]) -> Table:
    """The summary of a DataModule's rows as a table.

    Args:
        summary: the result of `summarize`; unknown facts are left out.
    """
    counts, labels = summary.get("rows", {}), summary.get("labels", {})
    rows = [["rows", *(f"{count:,}" for count in counts.values())]]
    for label in dict.fromkeys(name for names in labels.values() for name in names):
        cells = (f"{labels.get(split, {}).get(label, 0):,}" for split in counts)
        rows.append([f"labeled {quote_label(label)}", *cells])
    for what, shares in cut_shares_by_kind(summary).items():
        rows.append([what, *(f"{shares[split]:.1%}" if split in shares else "" for split in counts)])
    return Table(header=["data", *counts], rows=rows, note="\n".join(summary.get("warnings", [])))


# ---- the closing table


def show_report(values: Mapping[str, Any], console: Console) -> None:
    """Print a run's report as one table."""
    console.print(Table(title=f"Run {values.get('run_dir', '')}", rows=report_rows(values)))


BASELINES = {"probe": "linear probe", "pixels": "raw pixels", "majority": "majority class"}
"""Names in the closing table, by the beginning of a report's keys."""
PLACES = {
    "adapter_dir": "adapter (PEFT)",
    "merged_dir": "merged model",
    "checkpoint": "checkpoint",
    "page": "page of the run",
}
"""Names in the closing table, by a report's keys."""


def report_rows(v: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows of the closing table, for the known facts, the most important first."""
    rows = [
        _accuracies(v, "LoRA", "val_accuracy", "test_accuracy"),
        *(_accuracies(v, name, f"{key}_accuracy", f"{key}_test_accuracy") for key, name in BASELINES.items()),
        *_figures(v),
    ]
    if "test_rows" in v:
        rows.append(("rows tested", f"{v['test_rows']:,} of {v['test_data']}"))
    if "trainable" in v:
        share = f"{v['trainable']:,} of {v['total']:,} ({v['trainable'] / v['total']:.2%})"
        rows.append(("trainable parameters", share))
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
    rows += [(name, str(v.get(key) or "")) for key, name in PLACES.items()]
    return [row for row in rows if row[1]]


def _accuracies(v: Mapping[str, Any], name: str, validation: str, test: str) -> tuple[str, str]:
    stages = (("validation", validation), ("test", test))
    parts = [f"{label} {v[key]:.1%}{_before(v, key, '.1%')}" for label, key in stages if key in v]
    return f"accuracy, {name}", ", ".join(parts)


def _figures(v: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The stages' other metrics, with the titles of `metric_titles`: `val F1 (macro)`."""
    rows, titles = [], v.get("metric_titles") or {}
    for key, value in v.items():
        stage, _, metric = key.partition("_")
        if stage not in ("val", "test") or metric == "accuracy" or key.endswith(BEFORE) or not isinstance(value, float):
            continue
        rows.append((f"{stage} {titles.get(metric, metric)}", f"{value:.4f}{_before(v, key, '.4f')}"))
    return rows


def _before(v: Mapping[str, Any], key: str, form: str) -> str:
    """The metric before training, where `MeasureBefore` has measured it."""
    before = v.get(f"{key}{BEFORE}")
    return f" ({before:{form}} before)" if isinstance(before, float) else ""


def _export_rows(v: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The comparison of the exported files with the trained model."""
    rows = []
    if "export_max_rel_diff" in v:
        merged = "merged" in v.get("export_formats", ["merged"])
        rule = str(v.get("export_rule", ""))
        limit = f"{v.get('export_tolerance', 0.0):.0e}{' ' if rule.startswith(('in', 'for')) else ', '}{rule}"
        what = "merged against adapted" if merged else "adapter read back"
        rows.append((what, f"{v['export_max_rel_diff']:.1e} relative (allowed {limit})"))
    if v.get("export_scale", 1.0) != 1.0:
        rows.append(("strength of the update", f"{v['export_scale']:g} of what was trained"))
    if not v.get("merged_dir"):
        return rows
    if v.get("merged_bytes"):
        files = v.get("export_files", 1)
        split = f" in {files} files" if files > 1 else ""
        rows.append(("merged weights", f"{v.get('export_dtype')}, {human_size(v['merged_bytes'])}{split}"))
    if v.get("export_kept_least", 1.0) < 0.9995:
        low = f"{v['export_kept_low']} of {v['export_layers']} layers below {LEAST_KEPT:.0%}"
        rows.append(("update kept by rounding", f"at least {v['export_kept_least']:.1%} ({low})"))
    if v.get("export_dequantized"):
        rows.append(("dequantized", f"{v['export_dequantized']} layers, plain in the merged model"))
    return rows
