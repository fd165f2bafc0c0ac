"""What two models return for one batch, and how far apart that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import MergeError
from lora_lightning.lora.frozen.dtype import short
from lora_lightning.lora.frozen.quantization import scheme

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Largest |exported - adapted| over the largest |adapted|, of each output. In half precision rounding W0 + s B A alone
moves outputs by some units in the last place per layer, so there the rule is 16 units of the dtype's precision."""
FOUR_BIT = 1e-4
"""bitsandbytes' 4-bit product adds up in an order of its own, which a plain layer does not."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Between the adapted model's outputs and another's."""

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
    """Tensors in mappings, sequences, dataclasses, and in what objects such as caches of keys and values hold."""
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
    """Over all outputs; equal infinities and NaN in the same places count as equal.

    Raises:
        MergeError: there is nothing to compare, or the outputs are of other number or shapes.
    """
    shapes = [tuple(t.shape) for t in adapted]
    if [tuple(t.shape) for t in exported] != shapes:
        raise MergeError(f"{what} returns {len(exported)} outputs, {_shapes(exported)}, for {_shapes(adapted)}")
    if not any(torch.isfinite(t).any() for t in adapted):
        raise MergeError("the adapted model returns no finite number for the probe: nothing can be compared")
    largest = relative = 0.0
    for a, b in zip(adapted, exported, strict=True):
        far, size = _apart(a.double(), b.double())
        largest, relative = _max(largest, far), _max(relative, far / size)
    return Difference(outputs=len(adapted), max_abs_diff=largest, max_rel_diff=relative)


def _apart(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest |b - a|, and the largest finite |a|."""
    equal = (a == b) | (a.isnan() & b.isnan())
    far = torch.where(equal, 0.0, (a - b).abs())
    finite = a[torch.isfinite(a)].abs()
    size = float(finite.max()) if finite.numel() else 0.0
    return float(far.max()) if far.numel() else 0.0, max(size, torch.finfo(torch.float32).tiny)


def _max(a: float, b: float) -> float:
    """NaN is larger than any number: it must fail the comparison, and `max` would drop it."""
    return a if math.isnan(a) or a > b else b


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors[:4]) + (", ..." if len(tensors) > 4 else "")


def tolerance(backbone: nn.Module, dtype: torch.dtype | None = None) -> tuple[float, str]:
    """The largest relative difference that rounding explains, and the rule in words.

    Args:
        backbone: the adapted model.
        dtype: of the merged model, where it is another.
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
    return allowed, f"in {short(coarsest)}" if coarsest in TOLERANCE else f"16 units of {short(coarsest)}'s precision"
