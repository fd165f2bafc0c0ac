"""Backbones of many blocks that are alike: two short ones tell what a deep one needs, for each block adds the same."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from lora_lightning.training.blocks import repeated_blocks

FEW = 12
"""Blocks up to which a backbone is traced as it is."""
SHORT = 3
"""Blocks of the shorter of two: a first, a last and one between."""


def depth_of(backbone: nn.Module) -> tuple[str, int] | None:
    """The list that holds all of a backbone's blocks and their number, where they are many and alike."""
    blocks = repeated_blocks(backbone)
    parents = {name.rpartition(".")[0] for name in blocks}
    if len(parents) != 1 or len(blocks) <= FEW:
        return None
    (name,) = parents
    if type(backbone.get_submodule(name)) is not nn.ModuleList:
        return None
    first, *others = (_looks(block, number) for number, block in enumerate(blocks.values()))
    kinds = set(getattr(getattr(backbone, "config", None), "layer_types", None) or ())
    return (name, len(blocks)) if len(kinds) < 2 and all(other == first for other in others) else None


def shortened(backbone: nn.Module, name: str, blocks: int) -> nn.Module:
    """A copy with the first blocks of the list `name` alone."""
    short = copy.deepcopy(backbone)
    listed = short.get_submodule(name)
    assert isinstance(listed, nn.ModuleList)
    del listed[blocks:]
    return short


def _looks(block: nn.Module, number: int) -> list[Any]:
    """All that a block's computation can depend on but for its number."""
    plain = (bool, int, float, str)
    found: list[Any] = []
    for name, module in block.named_modules():
        own = {k: v for k, v in vars(module).items() if isinstance(v, plain) and not (v == number and k != "training")}
        numbers = {k for k, v in vars(module).items() if type(v) is int and v == number}
        stores = (module._parameters, module._buffers)
        tensors = {k: _of(t) for store in stores for k, t in store.items()}
        found.append((name, type(module), {k: v for k, v in own.items() if k not in numbers}, tensors))
    return found


def _of(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
