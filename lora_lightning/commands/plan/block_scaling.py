"""Costs of a backbone of many equal blocks, from two short copies: each block adds the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from lora_lightning.commands.plan.step_cost import NUMBERS, StepCost
from lora_lightning.lora.targets.blocks import repeated_blocks

FEW = 8
"""Up to so many blocks, a backbone is traced whole."""
SHORT = 2
"""Blocks of the shorter copy, a first and a last; the longer copy has one between."""


def cost_of_copies(backbone: nn.Module, trace: Callable[[nn.Module], StepCost]) -> StepCost:
    """What `trace` finds of a copy of the backbone, or what follows from two short ones where all blocks are equal."""
    depth = depth_of(backbone)
    if depth is not None:
        name, blocks = depth
        try:
            shorter, longer = (trace(shorten(backbone, name, n)) for n in (SHORT, SHORT + 1))
            return scale(longer, shorter, blocks - SHORT - 1)
        except Exception:  # a model that counts its blocks is traced whole
            pass
    return trace(copy.deepcopy(backbone))


def depth_of(backbone: nn.Module) -> tuple[str, int] | None:
    """The name and the length of the list of all blocks, where they are many and equal."""
    blocks = repeated_blocks(backbone)
    parents = {name.rpartition(".")[0] for name in blocks}
    if len(parents) != 1 or len(blocks) <= FEW:
        return None
    (name,) = parents
    if type(backbone.get_submodule(name)) is not nn.ModuleList:
        return None
    kinds = set(getattr(getattr(backbone, "config", None), "layer_types", None) or ())
    return (name, len(blocks)) if len(kinds) < 2 and _are_alike(list(blocks.values())) else None


def _are_alike(blocks: list[nn.Module]) -> bool:
    """Whether all blocks agree in what their computation can depend on, apart from their indices."""
    first, *others = signatures = [_signature(block) for block in blocks]
    if any(other.keys() != first.keys() for other in others):
        return False
    columns = ([signature[key] for signature in signatures] for key in first)
    indices = list(range(len(blocks)))
    return all(column in (indices, column[:1] * len(blocks)) for column in columns)


def _signature(block: nn.Module) -> dict[tuple[str, str], Any]:
    """Classes, plain attributes and tensor shapes of all modules in a block, by module and name."""
    signature: dict[tuple[str, str], Any] = {}
    for name, module in block.named_modules():
        signature[name, "class"] = type(module)
        signature |= {(name, k): v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            signature[name, key] = tensor if tensor is None else (tensor.shape, tensor.dtype, tensor.requires_grad)
    return signature


def shorten(backbone: nn.Module, name: str, blocks: int) -> nn.Module:
    """A copy with only the first `blocks` of the list `name`."""
    short = copy.deepcopy(backbone)
    listed = short.get_submodule(name)
    assert isinstance(listed, nn.ModuleList)
    del listed[blocks:]
    return short


def scale(longer: StepCost, shorter: StepCost, times: int) -> StepCost:
    """The cost of a model with `times` more blocks than `longer`, where `shorter` has one block less.

    Sums grow equally with each block. So does the memory at each moment from the beginning of the last block's forward
    to the end of its backward, when it is largest. The peak may be at another moment in a deep model than in a shallow
    one, so moments are extrapolated one by one.
    """
    cost = {n: getattr(longer, n) + times * (getattr(longer, n) - getattr(shorter, n)) for n in NUMBERS}
    (forward, backward), (forward_less, backward_less) = longer.curves, shorter.curves
    cost["in_forward"] = _highest(forward[::-1], forward_less[::-1], times)
    cost["in_backward"] = _highest(backward, backward_less, times)
    return StepCost(**cost, curves=longer.curves)


def _highest(longer: list[int], shorter: list[int], times: int) -> int:
    """The extrapolated maximum of the moments near the last block, counted from it."""
    of_a_block = len(longer) - len(shorter)
    common = min(len(shorter), max(1, len(shorter) - of_a_block))
    return max(a + times * (a - b) for a, b in zip(longer[:common], shorter[:common], strict=True))
