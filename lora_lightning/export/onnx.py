"""ONNX by torch's own exporter, and the proof in onnxruntime that it computes what the model computes."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.export.compare import difference
from lora_lightning.lora.errors import LoRAError, MergeError
from lora_lightning.lora.inject import grafted_modules

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
"""Largest |onnxruntime - PyTorch| over the largest |PyTorch|, in float32: other kernels sum in another order."""

ONE_FILE = 1_500_000_000
"""Bytes of weights above which they go into a file beside: protobuf ends at 2 GB."""


@dataclass(frozen=True, kw_only=True)
class OnnxReport:
    """What was written and how near it is."""

    file: str
    size: int
    """Bytes, weights beside it included."""
    inputs: dict[str, list[str | int]]
    """By name, the axes: a word where the size may change."""
    outputs: list[str]
    max_rel_diff: float
    """Over the probe batch, one row of it and one of another size."""
    tolerance: float = TOLERANCE


def export_onnx(model: nn.Module, inputs: Mapping[str, Any], path: str | Path) -> OnnxReport:
    """Write a plain model as ONNX, in float32, with a dynamic batch axis, and a dynamic length where inputs are tokens.

    Outputs in onnxruntime are compared with PyTorch's on `inputs`, on its first row and on a batch of another size and
    length. The file is moved into place after that.

    Args:
        model: without adapters; it is left as it was.
        inputs: a probe batch, as keyword arguments of the model, without labels. What is no tensor is fixed.

    Raises:
        LoRAError: the packages are missing, the model is adapted, or the exporter cannot express it.
        MergeError: outputs differ by more than the tolerance; nothing is written then.
    """
    refuse_missing()
    if grafted_modules(model):
        raise LoRAError("ONNX is written of a plain model: merge(model) first")
    tensors = {name: _twice(value) for name, value in inputs.items() if isinstance(value, Tensor)}
    fixed = {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, _for_export(model) as plain, torch.no_grad():
        aside = Path(folder)
        called = _Called(plain, fixed)
        _export(called, tensors, aside / path.name)
        batches = (tensors, _other(tensors), {name: value[:1] for name, value in tensors.items()})
        worst = max(_difference(called, batch, aside / path.name) for batch in batches)
        if not worst <= TOLERANCE:  # also refuses NaN
            raise MergeError(
                f"onnxruntime differs from PyTorch by {worst:.2e} relative, above {TOLERANCE:.0e}: nothing was written"
            )
        shapes = _session(aside / path.name).get_inputs()
        files = sorted(aside.iterdir(), key=lambda file: file.name == path.name)  # the model after its weights
        size = sum(file.stat().st_size for file in files)
        for file in files:
            file.replace(path.with_name(file.name))
    axes = {one.name: list(one.shape) for one in shapes}
    return OnnxReport(file=path.name, size=size, inputs=axes, outputs=called.names, max_rel_diff=worst)


def refuse_missing() -> None:
    """Raise a LoRAError where a package of the extra is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise LoRAError(f'ONNX needs {", ".join(missing)}: pip install "lora_lightning[onnx]"')


class _Called(nn.Module):
    """The model with its inputs in one dictionary, and its output's tensors as a tuple."""

    def __init__(self, model: nn.Module, fixed: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.fixed, self.names = model, fixed, list[str]()

    def forward(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Every tensor that the model returns; caches are left out."""
        result = self.model(**tensors, **self.fixed)
        if isinstance(result, Tensor):
            result = {"output": result}
        elif not isinstance(result, Mapping):
            result = {f"output_{i}": value for i, value in enumerate(result)}
        found = {name: value for name, value in result.items() if isinstance(value, Tensor)}
        self.names = list(found)
        return tuple(found.values())


@contextlib.contextmanager
def _for_export(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode, in float32 and without a cache; afterwards as it was."""
    half = any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters())
    plain = copy.deepcopy(model).float() if half else model
    modes = {module: module.training for module in plain.modules()}
    configs: list[Any] = [getattr(module, "config", None) for module in plain.modules()]
    configs = [config for config in configs if getattr(config, "use_cache", False) is True]
    try:
        for config in configs:
            config.use_cache = False
        yield plain.eval()
    finally:
        for config in configs:
            config.use_cache = True
        for module, training in modes.items():
            module.training = training


def _export(called: _Called, tensors: dict[str, Tensor], file: Path) -> None:
    # From two rows on: torch may make a rule of it under attention's mask. That one row is right too is proven after.
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length")
    shapes = {name: {0: batch, **({1: length} if _is_tokens(t) else {})} for name, t in tensors.items()}
    called.eval()(tensors)  # also names the outputs
    size = sum(p.numel() * p.element_size() for p in called.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                called,
                (),
                str(file),
                kwargs={"tensors": tensors},
                input_names=list(tensors),
                output_names=called.names,
                dynamic_shapes={"tensors": shapes},
                dynamo=True,
                external_data=size > ONE_FILE,
                verbose=False,
            )
        except Exception as error:  # whatever the model's own code makes of symbolic sizes
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            name = type(called.model).__name__
            raise LoRAError(f"torch cannot express {name} in ONNX ({reason}): export the merged model") from error


def _difference(called: _Called, tensors: dict[str, Tensor], file: Path) -> float:
    """Largest difference of any output, relative to that output's largest entry in PyTorch."""
    wanted = [tensor.cpu() for tensor in called(tensors)]
    got = _session(file).run(None, {name: tensor.cpu().numpy() for name, tensor in tensors.items()})
    return difference(wanted, [torch.from_numpy(one) for one in got], "the ONNX model").max_rel_diff


def _session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _is_tokens(tensor: Tensor) -> bool:
    """Whole numbers or a mask, one row an example."""
    return tensor.dim() == 2 and not tensor.is_floating_point()


def _twice(tensor: Tensor) -> Tensor:
    """A batch of one is taken for a constant by the exporter."""
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return torch.cat([tensor, tensor]) if tensor.dim() and tensor.shape[0] == 1 else tensor


def _other(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch with a row more, and shorter where the length may change; no token is masked, lest none be left."""
    other = {}
    for name, tensor in tensors.items():
        longer = torch.cat([tensor, tensor[:1]])
        if _is_tokens(tensor):
            longer = longer[:, : max(1, tensor.shape[1] // 2)]
        other[name] = torch.ones_like(longer) if "mask" in name and _is_tokens(tensor) else longer
    return other
