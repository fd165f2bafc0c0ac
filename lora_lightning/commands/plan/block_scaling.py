"""Backbones of many blocks that are alike: two short ones tell what a deep one needs, for each block adds the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lora_lightning.training.activations.blocks import repeated_blocks

FEW = 8
"""Blocks up to which a backbone is traced as it is."""
SHORT = 2
"""Blocks of the shorter of two, a first and a last; the longer has one between."""


def depth_of(backbone: nn.Module) -> tuple[str, int] | None:
    """The list that holds all of a backbone's blocks and their number, where they are many and alike."""
    blocks = repeated_blocks(backbone)
    parents = {name.rpartition(".")[0] for name in blocks}
    if len(parents) != 1 or len(blocks) <= FEW:
        return None
    (name,) = parents
    if type(backbone.get_submodule(name)) is not nn.ModuleList:
        return None
    kinds = set(getattr(getattr(backbone, "config", None), "layer_types", None) or ())
    return (name, len(blocks)) if len(kinds) < 2 and _alike(list(blocks.values())) else None


def shortened(backbone: nn.Module, name: str, blocks: int) -> nn.Module:
    """A copy with the first blocks of the list `name` alone."""
    short = copy.deepcopy(backbone)
    listed = short.get_submodule(name)
    assert isinstance(listed, nn.ModuleList)
    del listed[blocks:]
    return short


def _alike(blocks: Sequence[nn.Module]) -> bool:
    """Whether all agree in what their computation can depend on, but for their own numbers."""
    looks = [_looks(block) for block in blocks]
    numbers = {key for key in looks[0] if all(type(v := own.get(key)) is int and v == i for i, own in enumerate(looks))}
    return all(
        {k: own[k] for k in own.keys() - numbers} == {k: v for k, v in looks[0].items() if k not in numbers}
        for own in looks
    )


def _looks(block: nn.Module) -> dict[tuple[str, str], Any]:
    """Classes, plain attributes and tensors' shapes of all modules in a block, by module and name."""
    found: dict[tuple[str, str], Any] = {}
    for name, module in block.named_modules():
        found[name, "class"] = type(module)
        found |= {(name, k): v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
        for store in (module._parameters, module._buffers):
            found |= {(name, k): _of(tensor) for k, tensor in store.items()}
    return found


def _of(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
