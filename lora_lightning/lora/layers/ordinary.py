"""Which layers and calls the quick arithmetic takes: torch's own classes that compute with ordinary tensors."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_lightning.lora.drops import dropped_of_256
from lora_lightning.lora.frozen.quantization import scheme
from lora_lightning.lora.layers.class_swap import own_class
from lora_lightning.lora.layers.trained.bias import TrainedBias
from lora_lightning.lora.traced import is_ordinary

if TYPE_CHECKING:
    from lora_lightning.lora.layers.base import AdaptedLayer


@functools.cache
def has_weights_of_its_own(cls: type) -> bool:
    """Whether weight and bias are read as they lie in the module, through no property such as a parametrisation's."""
    bases = [base for base in cls.__mro__ if base is not TrainedBias]  # whose copy is asked for by name
    return not any(name in vars(base) for base in bases for name in ("weight", "bias"))


def of_one_dtype(x: Tensor, weight: Tensor) -> bool:
    """Whether torch would multiply these, alike or made alike by autocast."""
    mixed = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
    return x.dtype == weight.dtype or mixed


def drops_by_bytes(p: float) -> bool:
    """Whether a byte can decide with a probability near p."""
    return not p or 0 < dropped_of_256(p) < 256


def why_not_ordinary(layer: AdaptedLayer, *, of_its_own: bool) -> str | None:
    """Why no call of this layer is quick; None where ordinary calls are.

    Args:
        of_its_own: whether its class computes in another way than torch's.
    """
    weight, p = layer._parameters.get("weight"), layer.lora_settings.dropout
    if (quantised := scheme(layer)) is not None:
        return f"W0 is quantised, {quantised}"
    if of_its_own or weight is None:
        return f"{own_class(type(layer)).__name__} reads its weight in its own way"
    if not is_ordinary(weight.data):
        return f"W0 is a {type(weight.data).__name__}"
    return None if drops_by_bytes(p) else f"dropout {p:g} is not within 1/512 and 511/512"
