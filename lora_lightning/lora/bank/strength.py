"""Change the strength of an update for as long as a block runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.inject import adapted_layers, grafted_modules


@contextmanager
def scaled(model: nn.Module, strength: float) -> Iterator[None]:
    """Within the block the update has another strength: every trained W is `W0 + strength (W - W0)`.

    Each layer's s and alpha are multiplied by it; copies of `modules_to_save`, trained biases and token rows are
    interpolated, and DoRA's magnitudes are adjusted. At 0 the model computes as its base, at 1 as trained. What is
    saved, merged or exported within the block has this strength; afterwards every tensor is restored bit for bit.

    Raises:
        LoRAError: the strength is no finite number of at least 0, or a layer cannot have it.
    """
    refuse_strength(strength)
    if strength == 1:
        yield
        return
    tensors = list({id(t): t for t in adapter_tensors(model).values()}.values())
    if any(tensor.is_meta for tensor in tensors):
        raise LoRAError("the model is on the meta device, where nothing has a strength: give it its weights first")
    before = [tensor.detach().clone() for tensor in tensors]
    settings = [(layer, layer.lora_settings) for _, layer in adapted_layers(model)]
    done: set[int] = set()
    try:
        with torch.no_grad():
            for _, module in grafted_modules(model):
                module.rescale_update(strength, done)
        yield
    finally:
        for tensor, values in zip(tensors, before, strict=True):
            tensor.detach().copy_(values)
        for layer, original in settings:
            if "lora_settings" in layer.__dict__:  # not after a merge
                layer.__dict__["lora_settings"] = original


def refuse_strength(strength: float) -> None:
    """Raise a LoRAError unless this is a finite number of at least 0."""
    is_number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not is_number or not math.isfinite(strength) or strength < 0:
        raise LoRAError(f"scale must be a finite number of at least 0 (0 is the base, 1 the adapter), got {strength!r}")
