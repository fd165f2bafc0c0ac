"""The proof of an export: what was written gives the outputs of what was trained, in numbers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.export.compare import Difference, difference, outputs, tolerance
from lora_lightning.export.model_files import reader, write_merged
from lora_lightning.export.onnx import OnnxReport, export_onnx
from lora_lightning.export.probe_batch import Probe, as_weights
from lora_lightning.lora.errors import MergeError
from lora_lightning.lora.formats.peft.load import load_adapter
from lora_lightning.lora.frozen.dtype import float_dtype, short
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.inject import remove
from lora_lightning.lora.kept import count_low
from lora_lightning.lora.kept import rounding_told as told
from lora_lightning.lora.merge import merge


@dataclass
class ExportReport:
    """What was written and how near it is to what was trained."""

    output_dir: str
    formats: list[str] = field(default_factory=list)
    max_abs_diff: float = 0.0
    """Largest |exported - adapted| over the probe batch's outputs, of all that was written, read back from disk."""
    max_rel_diff: float = 0.0
    """The same over the largest |adapted| of each output."""
    tolerance: float = 0.0
    rule: str = ""
    """What `tolerance` follows from."""
    probe: str = ""
    """Where the batch is from that the outputs are compared on."""
    compared: dict[str, Difference] = field(default_factory=dict)
    """Each comparison with the adapted model, by what was compared."""
    dtype: str | None = None
    """Of the merged model."""
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
    """Into how many weight files the merged model was split."""
    onnx_dir: str | None = None
    onnx_bytes: int = 0
    onnx: OnnxReport | None = None
    """The ONNX model's axes, and how near onnxruntime is to PyTorch, by its own tolerance."""
    trainable: int = 0
    total: int = 0
    label_names: list[str] | None = None
    """What the numbers of the classes mean, where the data says it."""
    kept: dict[str, float] = field(default_factory=dict)
    """By module, the share of the update that rounding to the merged model's dtype kept."""
    untied: list[str] = field(default_factory=list)
    """Modules whose weight was tied to another's and is their own in the merged model."""
    dequantised: list[str] = field(default_factory=list)
    """Modules that were quantised and are plain in the merged model."""

    @property
    def kept_least(self) -> float:
        """The smallest of `kept`."""
        return min(self.kept.values(), default=1.0)

    @property
    def kept_low(self) -> int:
        """In how many layers rounding erased more than a tenth of the update."""
        return count_low(self.kept)

    def metrics(self) -> dict[str, float]:
        """For a run's loggers."""
        names = ("max_abs_diff", "max_rel_diff", "tolerance", "adapter_bytes", "merged_bytes", "kept_least")
        return {f"export/{name}": float(getattr(self, name)) for name in names}


class Proof:
    """The adapted model's outputs for the probe, and the comparison of others with them."""

    def __init__(self, backbone: nn.Module, probe: Probe, report: ExportReport, dtype: torch.dtype | None) -> None:
        self.backbone, self.report, self.dtype = backbone, report, dtype
        self.inputs = as_weights(backbone, probe.inputs)
        self.adapted = outputs(backbone, self.inputs)
        report.probe = probe.source
        report.tolerance, report.rule = tolerance(backbone, dtype)

    def of_adapter(self, folder: Path) -> None:
        """Load the adapter onto the same W0, which the two models share."""
        own = {id(tensor) for tensor in adapter_tensors(self.backbone).values()}
        shared = (t for t in (*self.backbone.parameters(), *self.backbone.buffers()) if id(t) not in own)
        again = remove(copy.deepcopy(self.backbone, {id(tensor): tensor for tensor in shared}))
        load_adapter(again, folder)
        self._compare("the adapter read back", again.eval(), self.inputs)

    def of_merged(self, folder: Path | None, onnx: Path | None = None, **options: Any) -> None:
        """Merge a copy, write it in what forms are wanted, let it go, and read what was written."""
        plain = copy.deepcopy(self.backbone)
        merged = merge(plain, dequantize=True, dtype=self.dtype)
        self.report.kept, self.report.untied = merged.kept, merged.untied
        self.report.dequantised, self.report.dtype = merged.dequantised, short(float_dtype(plain))
        inputs = self._cast(self.inputs)
        self._compare("the merged model", plain, inputs)
        if onnx is not None:
            self.report.onnx = export_onnx(plain, inputs, onnx)
        if folder is None:
            return
        write_merged(plain, folder, **options)
        read = reader(plain, folder)
        del plain
        self._compare("the merged model read back", read(), inputs)

    def _cast(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Floating-point inputs as a model of another dtype takes them."""
        if self.dtype is None:
            return dict(inputs)
        return {
            k: v.to(self.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
        }

    def _compare(self, what: str, other: nn.Module, inputs: Mapping[str, Any]) -> None:
        report, found = self.report, difference(self.adapted, outputs(other, inputs), what)
        if not found.max_rel_diff <= report.tolerance:  # also refuses NaN
            raise MergeError(
                f"{what} differs from the adapted one by {found.max_rel_diff:.2e} relative, above"
                f" {report.tolerance:.0e} ({report.rule}): nothing was exported; keep the adapter, or export or load"
                f" the backbone in float32"
            )
        report.compared[what] = found
        report.max_abs_diff = max(report.max_abs_diff, found.max_abs_diff)
        report.max_rel_diff = max(report.max_rel_diff, found.max_rel_diff)


def rounding_told(report: ExportReport) -> str | None:
    """What to tell of the layers of which rounding erased more than a tenth of the update."""
    return told(report.kept, str(report.dtype))
