"""The dtypes of W0: naming them, casting W0, and refusing values that a dtype cannot hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import LoRAError, MergeError, did_you_mean
from lora_lightning.lora.frozen.quantization import scheme
from lora_lightning.lora.frozen.tensors import BaseTensor, iter_base, named_modules
from lora_lightning.lora.layers import AdaptedLayer

DType = Literal["auto", "float32", "bfloat16", "float16"]
"""A dtype as an option; `auto` keeps each tensor's."""


def parse_dtype(name: str) -> torch.dtype | None:
    """The dtype with this name, None for `auto`; a LoRAError for a name that is not in `DType`."""
    known = get_args(DType)
    if name not in known:
        raise LoRAError(f"dtype must be {', '.join(known)}, got '{name}'{did_you_mean(str(name), known)}")
    return None if name == "auto" else getattr(torch, name)  # type: ignore[no-any-return]


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name without `torch.`, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of W0's first plain floating-point parameter, float32 where there is none."""
    return next((place.tensor.dtype for place in _plain_floats(model) if place.is_parameter), torch.float32)


def base_dtypes(model: nn.Module) -> dict[str, int]:
    """The number of W0's elements by dtype, or by the name of their quantization; the largest first."""
    counts = Counter[str]()
    for place in {id(place.tensor): place for place in iter_base(model) if place.is_parameter}.values():
        quantized = scheme(place.module) if place.key == "weight" else None
        if quantized is not None and isinstance(place.module, nn.Linear):
            counts[quantized] += place.module.in_features * place.module.out_features
        else:
            counts[dtype_name(place.tensor.dtype)] += place.tensor.numel()
    return dict(counts.most_common())


@torch.no_grad()
def cast_base(model: nn.Module, dtype: torch.dtype, other: Mapping[str, torch.dtype] | None = None) -> None:
    """Round the frozen tensors to `dtype`, in place, one at a time; a second call changes nothing.

    Not cast: the adapter, what trains, quantized weights, integers, and buffers that are not persistent, such as the
    frequencies of rotary embeddings. Ties stay. Where DoRA's magnitudes still are W0's norms, they become those of the
    rounded W0, so that a fresh adapter changes nothing (law 1).

    Args:
        model: adapted, or with frozen parameters.
        other: dtypes of single tensors, by name.
    """
    layers = [module for _, module in named_modules(model) if isinstance(module, AdaptedLayer)]
    magnitudes = [(layer, m) for layer in layers if (m := layer.lora_magnitude_vector) is not None and not m.is_meta]
    fresh = [(layer, m) for layer, m in magnitudes if torch.equal(m, layer.updated_norms())]
    for place in base_floats(model):
        _set_tensor(place, place.tensor.to((other or {}).get(place.name, dtype)))
    for layer, magnitude in fresh:
        magnitude.copy_(layer.updated_norms())


def base_floats(model: nn.Module) -> Iterator[BaseTensor]:
    """The frozen plain floats without buffers of a module that trains, and without float8, which is mere storage."""
    training = {place.module for place in iter_base(model) if place.tensor.requires_grad}
    for place in _plain_floats(model):
        trains = place.tensor.requires_grad if place.is_parameter else place.module in training
        if not trains and place.tensor.dtype.itemsize > 1:
            yield place


def cast(model: nn.Module, dtype: torch.dtype, *, widen: bool = False) -> None:
    """Round W0 to `dtype` in place, or `widen` it to the dtype that holds both its values and those of `dtype`."""
    for place in _plain_floats(model):
        _set_tensor(place, place.tensor.to(torch.promote_types(place.tensor.dtype, dtype) if widen else dtype))


def _plain_floats(model: nn.Module) -> Iterator[BaseTensor]:
    for place in iter_base(model):
        if place.tensor.is_floating_point() and not (place.key == "weight" and scheme(place.module)):
            yield place


def _set_tensor(place: BaseTensor, value: Tensor) -> None:
    if not place.is_parameter:
        place.module._buffers[place.key] = value
    elif place.tensor.dtype != value.dtype:
        place.tensor.data = value  # so that modules that share the parameter still do


def refuse_dtype(dtype: torch.dtype) -> None:
    """Raise a MergeError unless this is a floating-point dtype of at least 16 bits."""
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise MergeError(f"a merged model is float32, bfloat16 or float16 (or float64), not {dtype_name(dtype)}")


def refuse_wide(model: nn.Module, dtype: torch.dtype) -> None:
    """Raise a MergeError where a tensor of W0 has a number beyond the range of `dtype`."""
    for place in _plain_floats(model):
        refuse_overflow(f"'{place.name}'", place.tensor, dtype)


def refuse_overflow(what: str, wide: Tensor, dtype: torch.dtype) -> None:
    """Raise a MergeError where rounding to `dtype` makes a finite number infinite, as float16 does beyond 65504."""
    if not (wide.is_floating_point() and dtype.is_floating_point) or not wide.numel():
        return
    if torch.finfo(wide.dtype).max <= torch.finfo(dtype).max:
        return
    ends = torch.stack(torch.aminmax(wide.detach()))
    if torch.isfinite(ends.to(dtype)).all():
        return  # the usual case, without a second tensor of this size
    if (torch.isinf(wide.to(dtype)) & torch.isfinite(wide)).any():
        way_out = {torch.float16: "float32 or bfloat16", torch.float32: "float64"}.get(dtype, "float32")
        raise MergeError(f"{what} is larger than {dtype_name(dtype)} can hold: merge into {way_out}")
