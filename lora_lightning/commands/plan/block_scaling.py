"""Backbones of many blocks that are alike: two short ones tell what a deep one needs, for each block adds the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lora_lightning.commands.plan.step_cost import NUMBERS, StepCost
from lora_lightning.lora.targets.blocks import repeated_blocks

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


def shorten(backbone: nn.Module, name: str, blocks: int) -> nn.Module:
    """A copy with the first blocks of the list `name` alone."""
    short = copy.deepcopy(backbone)
    listed = short.get_submodule(name)
    assert isinstance(listed, nn.ModuleList)
    del listed[blocks:]
    return short


def _alike(blocks: Sequence[nn.Module]) -> bool:
    """Whether all agree in what their computation can depend on, but for their own numbers."""
    looks = [_looks(block) for block in blocks]
    numbers = {
        key for key in looks[0] if all(type(v := look.get(key)) is int and v == i for i, look in enumerate(looks))
    }
    return all(
        {k: look[k] for k in look.keys() - numbers} == {k: v for k, v in looks[0].items() if k not in numbers}
        for look in looks
    )


def _looks(block: nn.Module) -> dict[tuple[str, str], Any]:
    """Classes, plain attributes and tensors' shapes of all modules in a block, by module and name."""
    look: dict[tuple[str, str], Any] = {}
    for name, module in block.named_modules():
        look[name, "class"] = type(module)
        look |= {(name, k): v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
        for store in (module._parameters, module._buffers):
            look |= {(name, k): _of(tensor) for k, tensor in store.items()}
    return look


def _of(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


def scale(longer: StepCost, shorter: StepCost, times: int) -> StepCost:
    """The cost of a model with `times` more blocks than `longer` has, each alike, where `shorter` has one less.

    Sums grow by as much with each block. So does what is held at each moment after the last block's forward began
    and until its backward ends, which is when most is held; the most of all is at another moment in a deep model
    than in a shallow one, so moments are compared one by one.
    """
    numbers = {n: getattr(longer, n) + times * (getattr(longer, n) - getattr(shorter, n)) for n in NUMBERS}
    (forward, backward), (forward_less, backward_less) = longer.curves, shorter.curves
    numbers["in_forward"] = _most(forward[::-1], forward_less[::-1], times)
    numbers["in_backward"] = _most(backward, backward_less, times)
    return StepCost(**numbers, curves=longer.curves)


def _most(longer: list[int], shorter: list[int], times: int) -> int:
    """At most, of the moments on the last block's side, counted from it."""
    of_a_block = len(longer) - len(shorter)
    there = min(len(shorter), max(1, len(shorter) - of_a_block))
    return max(a + times * (a - b) for a, b in zip(longer[:there], shorter[:there], strict=True))
