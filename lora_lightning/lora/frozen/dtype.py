"""The dtype of a model's own tensors: what it is, and the change to another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import LoRAError, MergeError, did_you_mean
from lora_lightning.lora.frozen.quantization import scheme
from lora_lightning.lora.frozen.tensors import joined, named_modules
from lora_lightning.lora.inject import grafted_modules

DType = Literal["auto", "float32", "bfloat16", "float16"]
"""What a person asks for; `auto` leaves each tensor its own."""


def checked_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name, None for `auto`.

    Raises:
        LoRAError: it is none of `DType`.
    """
    known = get_args(DType)
    if name not in known:
        raise LoRAError(f"dtype must be {', '.join(known)}, got '{name}'{did_you_mean(str(name), known)}")
    return None if name == "auto" else getattr(torch, name)  # type: ignore[no-any-return]


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's own first plain floating-point parameter, float32 where it has none."""
    return next((t.dtype for module, name, t in _floats(model) if name in module._parameters), torch.float32)


def widen(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring W0, in place, to a dtype that holds both its own values and those of `dtype`: nothing is rounded."""
    for module, name, tensor in _floats(model):
        _put(module, name, tensor.to(torch.promote_types(tensor.dtype, dtype)))


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Round all that is saved to `dtype`, in place. Ties stay; buffers that no file holds are left as they are."""
    for module, name, tensor in _floats(model):
        _put(module, name, tensor.to(dtype))


def refuse_dtype(dtype: torch.dtype) -> None:
    """Raise a MergeError for what is no floating-point dtype of at least 16 bits."""
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise MergeError(f"a merged model is float32, bfloat16 or float16 (or float64), not {short(dtype)}")


def refuse_wide(model: nn.Module, dtype: torch.dtype) -> None:
    """Raise a MergeError where a tensor of the model has a number beyond the range of `dtype`."""
    paths = {module: path for path, module in named_modules(model)}
    for module, name, tensor in _floats(model):
        refuse_overflow(f"'{joined(paths[module], name)}'", tensor, dtype)


def refuse_overflow(what: str, wide: Tensor, dtype: torch.dtype) -> None:
    """Raise where rounding to `dtype` would make a number infinite, as float16 does beyond 65504.

    Raises:
        MergeError: a number of `wide` is finite and beyond `dtype`'s range.
    """
    if not (wide.is_floating_point() and dtype.is_floating_point) or not wide.numel():
        return
    if torch.finfo(wide.dtype).max <= torch.finfo(dtype).max:
        return
    ends = torch.stack(torch.aminmax(wide.detach()))
    if torch.isfinite(ends.to(dtype)).all():
        return  # the rule, without a second tensor of that size
    if (torch.isinf(wide.to(dtype)) & torch.isfinite(wide)).any():
        way_out = {torch.float16: "float32 or bfloat16", torch.float32: "float64"}.get(dtype, "float32")
        raise MergeError(f"{what} is larger than {short(dtype)} can hold: merge into {way_out}")


def short(dtype: torch.dtype) -> str:
    """`bfloat16`, for a person."""
    return str(dtype).removeprefix("torch.")


def _floats(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The plain floating-point tensors of the backbone that its state dict has, where they are held."""
    ours = {id(t) for _, module in grafted_modules(model) for t in module.lora_tensors().values()}
    for module in model.modules():
        kept = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in (*module._parameters.items(), *kept.items()):
            if tensor is None or id(tensor) in ours or (name == "weight" and scheme(module)):
                continue
            if tensor.is_floating_point():
                yield module, name, tensor


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    own = module._parameters.get(name)
    if own is None:
        module._buffers[name] = value
    elif own.dtype != value.dtype:
        own.data = value  # the parameter stays the one that other modules share
