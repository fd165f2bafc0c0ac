"""The verification of an export: the written model's outputs are compared with the trained model's."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.export.model_files import reader, write_merged
from lora_lightning.export.probe_batch import Probe, cast_floats, cast_to_weights
from lora_lightning.lora.errors import MergeError
from lora_lightning.lora.formats.peft.load import load_adapter
from lora_lightning.lora.frozen.dtype import dtype_name, float_dtype
from lora_lightning.lora.frozen.quantization import scheme
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.inject import remove
from lora_lightning.lora.merge import merge
from lora_lightning.lora.report import count_low

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Largest |exported - adapted| over the largest |adapted|, of each output. In half precision rounding W0 + s B A alone
moves outputs by some units in the last place per layer, so there the rule is 16 units of the dtype's precision."""
FOUR_BIT = 1e-4
"""bitsandbytes' 4-bit product sums in another order than a plain layer."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference between the adapted model's outputs and another model's."""

    outputs: int
    """How many floating-point tensors were compared."""
    max_abs_diff: float
    """Largest |exported - adapted|."""
    max_rel_diff: float
    """The same over the largest |adapted| of that output."""


@torch.no_grad()
def outputs(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Every floating-point tensor that the model returns for one batch, however nested, on the CPU."""
    return [t.detach().cpu().clone() for t in _tensors(model(**inputs), set()) if t.is_floating_point()]


def _tensors(value: Any, seen: set[int]) -> Iterable[Tensor]:
    """Tensors in mappings, sequences, dataclasses, and in attributes of objects such as key-value caches."""
    if id(value) in seen or isinstance(value, str | bytes | type | nn.Module):
        return
    if isinstance(value, Tensor):
        yield value
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        inner: Iterable[Any] = value.values()
    elif isinstance(value, list | tuple):
        inner = value
    elif is_dataclass(value):
        inner = [getattr(value, field.name) for field in fields(value)]
    else:
        inner = getattr(value, "__dict__", {}).values()
    for part in inner:
        yield from _tensors(part, seen)


def difference(adapted: list[Tensor], exported: list[Tensor], what: str) -> Difference:
    """The largest differences over all outputs; equal infinities, and NaN in the same places, count as equal.

    Raises:
        MergeError: there is nothing to compare, or the outputs differ in number or shapes.
    """
    shapes, theirs = ([tuple(t.shape) for t in tensors] for tensors in (adapted, exported))
    if theirs != shapes:
        first = [", ".join(map(str, each[:4])) + (", ..." if len(each) > 4 else "") for each in (theirs, shapes)]
        raise MergeError(f"{what} returns {len(theirs)} outputs, {first[0]}, for {first[1]}")
    if not any(torch.isfinite(t).any() for t in adapted):
        raise MergeError("the adapted model returns no finite number for the probe: nothing can be compared")
    largest = relative = torch.zeros((), dtype=torch.float64)
    for a, b in ((a.double(), b.double()) for a, b in zip(adapted, exported, strict=True) if a.numel()):
        far = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).max()
        size = torch.where(a.isfinite(), a.abs(), 0.0).max().clamp_min(torch.finfo(torch.float32).tiny)
        # Unlike Python's `max`, it passes a NaN on.
        largest, relative = torch.maximum(largest, far), torch.maximum(relative, far / size)
    return Difference(outputs=len(adapted), max_abs_diff=largest.item(), max_rel_diff=relative.item())


def tolerance(backbone: nn.Module, dtype: torch.dtype | None = None) -> tuple[float, str]:
    """The largest relative difference that rounding can explain, and the rule in words.

    Args:
        backbone: the adapted model.
        dtype: of the merged model, where it differs from the backbone's.
    """
    dtypes = {p.dtype for p in backbone.parameters() if p.is_floating_point() and not p.requires_grad}
    dtypes |= {dtype} if dtype else set()
    schemes = {scheme(module): module for module in backbone.modules()}
    if "bitsandbytes 8-bit" in schemes:
        dtypes.add(torch.bfloat16)  # its inputs are rounded to 7 bits and a sign, as bfloat16 rounds
    four = schemes.get("bitsandbytes 4-bit")
    if four is not None and isinstance(four.compute_dtype, torch.dtype):
        dtypes.add(four.compute_dtype)
    coarsest = max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float32)
    allowed = TOLERANCE.get(coarsest, 16 * torch.finfo(coarsest).eps)
    if four is not None and allowed < FOUR_BIT:
        return FOUR_BIT, "for 4-bit products in float32"
    name = dtype_name(coarsest)
    return allowed, f"in {name}" if coarsest in TOLERANCE else f"16 units of {name}'s precision"


@dataclass
class ExportReport:
    """What was written, and how much its outputs differ from the trained model's."""

    output_dir: str
    formats: list[str] = field(default_factory=list)
    max_abs_diff: float = 0.0
    """Largest |exported - adapted| over the probe batch's outputs, of every format after reading it back."""
    max_rel_diff: float = 0.0
    """The same over the largest |adapted| of each output."""
    tolerance: float = 0.0
    rule: str = ""
    """The rule behind `tolerance`."""
    probe: str = ""
    """Where the probe batch comes from."""
    compared: dict[str, Difference] = field(default_factory=dict)
    """Each comparison with the adapted model, by what was compared."""
    dtype: str | None = None
    """Of the merged model."""
    scale: float = 1.0
    """The strength of the update that was written: 1 is what was trained."""
    w0_before: str = ""
    """SHA-256 of W0 as recorded when training started."""
    w0_after: str = ""
    """SHA-256 of W0 just before the merge."""
    w0_unchanged: bool = False
    adapter_dir: str | None = None
    merged_dir: str | None = None
    adapter_bytes: int = 0
    merged_bytes: int = 0
    merged_files: int = 0
    """The number of the merged model's weight files."""
    trainable: int = 0
    total: int = 0
    label_names: list[str] | None = None
    """The names of the classes, where the data have them."""
    kept: dict[str, float] = field(default_factory=dict)
    """By module, the share of the update that rounding to the merged model's dtype kept."""
    untied: list[str] = field(default_factory=list)
    """Modules whose weight was tied to another's and no longer is in the merged model."""
    dequantized: list[str] = field(default_factory=list)
    """Modules that were quantized and are plain in the merged model."""

    @property
    def kept_least(self) -> float:
        """The smallest of `kept`."""
        return min(self.kept.values(), default=1.0)

    @property
    def kept_low(self) -> int:
        """The number of layers in which rounding erased more than a tenth of the update."""
        return count_low(self.kept)

    def facts(self) -> dict[str, Any]:
        """The values for a run's report."""
        same = ("adapter_dir", "adapter_bytes", "merged_dir", "merged_bytes", "trainable", "total")
        values = {name: getattr(self, name) for name in (*same, "w0_before", "w0_after", "w0_unchanged")}
        named = ("formats", "max_abs_diff", "max_rel_diff", "tolerance", "rule", "dtype", "probe", "scale")
        values |= {f"export_{name}": getattr(self, name) for name in (*named, "kept_least", "kept_low")}
        values |= {"export_dequantized": len(self.dequantized), "export_layers": len(self.kept)}
        return values | {"export_files": self.merged_files, "share": self.trainable / self.total}

    def metrics(self) -> dict[str, float]:
        """The values for a run's loggers."""
        names = ("max_abs_diff", "max_rel_diff", "tolerance", "adapter_bytes", "merged_bytes", "kept_least")
        return {f"export/{name}": float(getattr(self, name)) for name in names}


class Proof:
    """The adapted model's outputs for the probe, with which exported models are compared."""

    def __init__(self, backbone: nn.Module, probe: Probe, report: ExportReport, dtype: torch.dtype | None) -> None:
        self.backbone, self.report, self.dtype = backbone, report, dtype
        self.inputs = cast_to_weights(backbone, probe.inputs)
        self.adapted = outputs(backbone, self.inputs)
        report.probe = probe.source
        report.tolerance, report.rule = tolerance(backbone, dtype)

    def verify_adapter(self, folder: Path) -> None:
        """Load the written adapter onto the same W0, whose memory the two models share, and compare."""
        adapter = {id(tensor) for tensor in adapter_tensors(self.backbone).values()}
        shared = (t for t in (*self.backbone.parameters(), *self.backbone.buffers()) if id(t) not in adapter)
        reloaded = remove(copy.deepcopy(self.backbone, {id(tensor): tensor for tensor in shared}))
        load_adapter(reloaded, folder)
        self._compare("the adapter read back", reloaded.eval(), self.inputs)

    def verify_merged(self, folder: Path, **options: Any) -> None:
        """Merge a copy, compare it, write it, free it, read the files and compare again."""
        plain = copy.deepcopy(self.backbone)
        merged = merge(plain, dequantize=True, dtype=self.dtype)
        self.report.kept, self.report.untied = merged.kept, merged.untied
        self.report.dequantized, self.report.dtype = merged.dequantized, dtype_name(float_dtype(plain))
        inputs = self.inputs if self.dtype is None else cast_floats(self.inputs, self.dtype)
        self._compare("the merged model", plain, inputs)
        write_merged(plain, folder, **options)
        read = reader(plain, folder)
        del plain
        self._compare("the merged model read back", read(), inputs)

    def _compare(self, what: str, other: nn.Module, inputs: Mapping[str, Any]) -> None:
        report, figures = self.report, difference(self.adapted, outputs(other, inputs), what)
        if not figures.max_rel_diff <= report.tolerance:  # also refuses NaN
            raise MergeError(
                f"{what} differs from the adapted one by {figures.max_rel_diff:.2e} relative, above"
                f" {report.tolerance:.0e} ({report.rule}): nothing was exported; keep the adapter, or export or load"
                f" the backbone in float32"
            )
        report.compared[what] = figures
        report.max_abs_diff = max(report.max_abs_diff, figures.max_abs_diff)
        report.max_rel_diff = max(report.max_rel_diff, figures.max_rel_diff)
