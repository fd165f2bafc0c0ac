"""The adapted layers: one class per kind of base layer, found by the base layer's type."""

from __future__ import annotations

from torch import nn

from lora_lightning.lora.layers.base import AdaptedLayer, Grafted, LayerSettings, graft, ungraft
from lora_lightning.lora.layers.bias import TrainedBias
from lora_lightning.lora.layers.linear import LoRALinear
from lora_lightning.lora.layers.saved import SavedCopy

KINDS: dict[type[nn.Module], type[AdaptedLayer]] = {nn.Linear: LoRALinear}


def kind_of(module: nn.Module) -> type[AdaptedLayer] | None:
    """The adapted form of a module's type or of its nearest ancestor, or None where there is no such kind."""
    for base in type(module).__mro__:
        if base in KINDS:
            return KINDS[base]
    return None


__all__ = [
    "KINDS",
    "AdaptedLayer",
    "Grafted",
    "LayerSettings",
    "LoRALinear",
    "SavedCopy",
    "TrainedBias",
    "graft",
    "kind_of",
    "ungraft",
]
