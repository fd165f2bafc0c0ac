"""From a trained module to files that others open, and the proof in numbers that they hold what was trained."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import LoRAError, MergeError, did_you_mean
from lora_lightning.lora.fingerprint import fingerprint
from lora_lightning.lora.formats import load_adapter, save_adapter
from lora_lightning.lora.inject import remove
from lora_lightning.lora.merge import merge
from lora_lightning.lora.storage import read_tensors, write_bytes, write_tensors
from lora_lightning.tasks.base import inputs_of
from lora_lightning.training.module import LoRAModule

FORMATS = ("adapter", "merged")
WEIGHTS, REPORT = "model.safetensors", "export_report.json"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Largest |merged - adapted| over the largest |adapted|. In half precision rounding W0 + s B A alone moves outputs
by some units in the last place per layer, so there the rule is 16 units of the dtype's precision."""


@dataclass
class ExportReport:
    """What was written and how near it is to what was trained."""

    output_dir: str
    max_abs_diff: float = 0.0
    """Largest |exported - adapted| over the probe batch's outputs, of all that was written, read back from disk."""
    max_rel_diff: float = 0.0
    """The same over the largest |adapted|."""
    tolerance: float = 0.0
    w0_before: str = ""
    """SHA-256 of W0 as recorded when training started."""
    w0_after: str = ""
    """SHA-256 of W0 just before the merge."""
    w0_unchanged: bool = False
    adapter_dir: str | None = None
    merged_dir: str | None = None
    adapter_bytes: int = 0
    merged_bytes: int = 0
    trainable: int = 0
    total: int = 0
    label_names: list[str] | None = None
    """What the numbers of the classes mean, where the data says it."""
    kept: dict[str, float] = field(default_factory=dict)
    """By module, the share of the update that rounding to W0's dtype kept."""


def export(
    module: LoRAModule,
    output_dir: str | Path,
    *,
    batch: Mapping[str, Any],
    formats: Iterable[str] = FORMATS,
    tokenizer: Any = None,
    label_names: list[str] | None = None,
) -> ExportReport:
    """Write the adapter, the merged model, or both, and compare the outputs of each with the adapted model's.

    The module's backbone is left adapted. All is written beside `output_dir` and moved there in one step; where
    anything fails, `output_dir` is as it was.

    Args:
        batch: a probe, as the DataModule gives it.
        formats: of `adapter` (a PEFT directory) and `merged` (a transformers directory, or a safetensors file with
            the backbone's own keys).
        tokenizer: saved beside the adapter and the merged model.
        label_names: written into the report.

    Raises:
        LoRAError: an unknown format, or a folder in the way that is no export.
        MergeError: W0 moved in training, or the exported model's outputs differ by more than the tolerance.
    """
    wanted = _checked_formats(formats)
    target = Path(output_dir)
    if target.is_file():
        raise LoRAError(f"'{target}' is a file: name a folder")
    if target.exists() and any(target.iterdir()) and not (target / REPORT).is_file():
        raise LoRAError(f"'{target}' holds files that are not an export: name an empty or new folder")
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)
    report = ExportReport(output_dir=str(target), trainable=module.report.trainable, total=module.report.total)
    report.label_names = label_names
    try:
        aside.mkdir(parents=True)
        _write(module, aside, report, wanted, batch, tokenizer)
        report.adapter_dir = str(target / "adapter") if "adapter" in wanted else None
        report.merged_dir = str(target / "merged") if "merged" in wanted else None
        write_bytes(aside / REPORT, (json.dumps(asdict(report), indent=2) + "\n").encode())
        _move(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return report


def _checked_formats(formats: Iterable[str]) -> list[str]:
    wanted = list(dict.fromkeys(formats))
    for name in wanted:
        if name not in FORMATS:
            raise LoRAError(
                f"unknown export format '{name}'{did_you_mean(name, FORMATS)} (known: {', '.join(FORMATS)})"
            )
    if not wanted:
        raise LoRAError(f"no export format given: name some of {', '.join(FORMATS)}")
    return wanted


@torch.no_grad()
def _write(
    module: LoRAModule, folder: Path, report: ExportReport, wanted: list[str], batch: Mapping[str, Any], tokenizer: Any
) -> None:
    backbone = module.backbone
    modes = {m: m.training for m in backbone.modules()}
    backbone.eval()
    try:
        report.w0_before = module.w0_fingerprint().digest
        report.w0_after = fingerprint(backbone).digest
        report.w0_unchanged = report.w0_before == report.w0_after
        if not report.w0_unchanged:
            moved = module.w0_fingerprint().differences(fingerprint(backbone))
            raise MergeError(f"W0 moved in training: {len(moved)} tensors, first '{moved[0]}'; nothing was exported")
        inputs = inputs_of(batch, "labels")
        adapted = outputs(backbone, inputs)
        report.tolerance = _tolerance(backbone)
        if "adapter" in wanted:
            save_adapter(
                backbone,
                folder / "adapter",
                task_type=module.task.peft_task_type if is_transformers(backbone) else None,
            )
            if tokenizer is not None:
                tokenizer.save_pretrained(folder / "adapter")
            report.adapter_bytes = _size(folder / "adapter")
            again = remove(copy.deepcopy(backbone))
            load_adapter(again, folder / "adapter")
            _compare(report, adapted, outputs(again.eval(), inputs), "the adapter read back")
        if "merged" in wanted:
            plain = copy.deepcopy(backbone)
            report.kept = merge(plain).kept
            _compare(report, adapted, outputs(plain, inputs), "the merged model")
            _write_merged(plain, folder / "merged", tokenizer)
            report.merged_bytes = _size(folder / "merged")
            _compare(report, adapted, outputs(_read_back(plain, folder / "merged"), inputs), "the model read back")
    finally:
        for m, training in modes.items():
            m.training = training


def _write_merged(plain: nn.Module, folder: Path, tokenizer: Any) -> None:
    """A transformers model in its own way; any other as tensors under its own keys."""
    folder.mkdir(parents=True)
    if is_transformers(plain):
        plain.save_pretrained(folder)  # type: ignore[operator]
    else:
        write_tensors(folder / WEIGHTS, plain.state_dict(), {"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _read_back(plain: nn.Module, folder: Path) -> nn.Module:
    device = next(plain.parameters()).device
    if is_transformers(plain):
        kwargs: dict[str, Any] = {"dtype": next(p.dtype for p in plain.parameters() if p.is_floating_point())}
        kwargs["attn_implementation"] = getattr(plain.config, "_attn_implementation", None)
        return type(plain).from_pretrained(folder, **kwargs).to(device).eval()  # type: ignore[attr-defined,no-any-return]
    tensors, _ = read_tensors(folder / WEIGHTS)
    for tensor in plain.state_dict().values():
        tensor.zero_()  # so that only what the file holds can answer
    plain.load_state_dict(tensors, strict=True)
    return plain


def is_transformers(model: nn.Module) -> bool:
    """Whether the model saves and loads itself in transformers' format."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def outputs(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Every floating-point tensor that the model returns for one batch, in float64."""
    result = model(**inputs)
    values = (
        result.values() if isinstance(result, Mapping) else result if isinstance(result, tuple | list) else [result]
    )
    return [v.double() for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _compare(report: ExportReport, adapted: list[Tensor], exported: list[Tensor], what: str) -> None:
    for a, b in zip(adapted, exported, strict=True):
        difference = float((a - b).abs().max()) if a.numel() else 0.0
        relative = difference / max(float(a.abs().max()) if a.numel() else 0.0, torch.finfo(torch.float32).tiny)
        report.max_abs_diff = max(report.max_abs_diff, difference)
        report.max_rel_diff = max(report.max_rel_diff, relative)
    if not report.max_rel_diff <= report.tolerance:  # also refuses NaN
        raise MergeError(
            f"{what} differs from the adapted one by {report.max_rel_diff:.2e} relative, above {report.tolerance:.0e}:"
            " nothing was exported; keep the adapter, or load the backbone in float32"
        )


def _tolerance(model: nn.Module) -> float:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad}
    coarsest = max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float32)
    return TOLERANCE.get(coarsest, 16 * torch.finfo(coarsest).eps)


def _size(folder: Path) -> int:
    """Bytes of the weight files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _move(aside: Path, target: Path) -> None:
    """Put the finished folder into place; an older export there goes only once the new one stands."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.replace(old)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside.replace(target)
    shutil.rmtree(old, ignore_errors=True)
