"""The adapted layers: one class per kind of base layer, found by the base layer's type."""

from __future__ import annotations

from torch import nn

from lora_lightning.lora.layers.attention import LoRAMultiheadAttention, LoRAOutProj, OutProj
from lora_lightning.lora.layers.base import AdaptedLayer
from lora_lightning.lora.layers.class_swap import Grafted, graft, take_out
from lora_lightning.lora.layers.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from lora_lightning.lora.layers.embedding import LoRAEmbedding
from lora_lightning.lora.layers.linear import CONV1D, LoRAConv1D, LoRALinear
from lora_lightning.lora.layers.parameter import LoRAParameter, ParameterHost
from lora_lightning.lora.layers.trained.bias import TrainedBias
from lora_lightning.lora.layers.trained.module_copy import SavedCopy
from lora_lightning.lora.layers.trained.token_rows import TokenRows

KINDS: dict[type[nn.Module] | str, type[AdaptedLayer]] = {
    nn.Linear: LoRALinear,
    OutProj: LoRAOutProj,
    nn.Conv1d: LoRAConv1d,
    nn.Conv2d: LoRAConv2d,
    nn.Conv3d: LoRAConv3d,
    nn.Embedding: LoRAEmbedding,
    nn.MultiheadAttention: LoRAMultiheadAttention,
    CONV1D: LoRAConv1D,
}


def kind_of(module: nn.Module) -> type[AdaptedLayer] | None:
    """The adapted layer for a module's type or its nearest ancestor; None where there is none."""
    for base in type(module).__mro__:
        kind = KINDS.get(base) or KINDS.get(f"{base.__module__}.{base.__qualname__}")
        if kind is not None:
            return kind
    return None


__all__ = [
    "AdaptedLayer",
    "Grafted",
    "LoRAConv1D",
    "LoRALinear",
    "LoRAMultiheadAttention",
    "LoRAParameter",
    "ParameterHost",
    "SavedCopy",
    "TokenRows",
    "TrainedBias",
    "graft",
    "kind_of",
    "take_out",
]
