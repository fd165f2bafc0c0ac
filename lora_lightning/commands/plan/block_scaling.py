"""Costs of a backbone of many equal blocks, from two short copies: each block adds the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lora_lightning.commands.plan.step_cost import NUMBERS, StepCost
from lora_lightning.lora.targets.blocks import repeated_blocks

FEW = 8
"""Up to so many blocks, a backbone is traced whole."""
SHORT = 2
"""Blocks of the shorter copy, a first and a last; the longer copy has one between."""


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
    return (name, len(blocks)) if len(kinds) < 2 and _alike(list(blocks.values())) else None


def shorten(backbone: nn.Module, name: str, blocks: int) -> nn.Module:
    """A copy with only the first `blocks` of the list `name`."""
    short = copy.deepcopy(backbone)
    listed = short.get_submodule(name)
    assert isinstance(listed, nn.ModuleList)
    del listed[blocks:]
    return short


def _alike(blocks: Sequence[nn.Module]) -> bool:
    """Whether all blocks agree in what their computation can depend on, apart from their indices."""
    signatures = [_signature(block) for block in blocks]
    numbers = {
        key
        for key in signatures[0]
        if all(type(v := signature.get(key)) is int and v == i for i, signature in enumerate(signatures))
    }
    return all(
        {k: signature[k] for k in signature.keys() - numbers}
        == {k: v for k, v in signatures[0].items() if k not in numbers}
        for signature in signatures
    )


def _signature(block: nn.Module) -> dict[tuple[str, str], Any]:
    """Classes, plain attributes and tensor shapes of all modules in a block, by module and name."""
    signature: dict[tuple[str, str], Any] = {}
    for name, module in block.named_modules():
        signature[name, "class"] = type(module)
        signature |= {(name, k): v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
        for store in (module._parameters, module._buffers):
            signature |= {(name, k): _of(tensor) for k, tensor in store.items()}
    return signature


def _of(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


def scale(longer: StepCost, shorter: StepCost, times: int) -> StepCost:
    """The cost of a model with `times` more blocks than `longer`, where `shorter` has one block less.

    Sums grow equally with each block. So does the memory at each moment from the beginning of the last block's forward
    to the end of its backward, when it is largest. The peak may be at another moment in a deep model than in a shallow
    one, so moments are extrapolated one by one.
    """
    cost = {n: getattr(longer, n) + times * (getattr(longer, n) - getattr(shorter, n)) for n in NUMBERS}
    (forward, backward), (forward_less, backward_less) = longer.curves, shorter.curves
    cost["in_forward"] = _most(forward[::-1], forward_less[::-1], times)
    cost["in_backward"] = _most(backward, backward_less, times)
    return StepCost(**cost, curves=longer.curves)


def _most(longer: list[int], shorter: list[int], times: int) -> int:
    """The extrapolated maximum of the moments near the last block, counted from it."""
    of_a_block = len(longer) - len(shorter)
    common = min(len(shorter), max(1, len(shorter) - of_a_block))
    return max(a + times * (a - b) for a, b in zip(longer[:common], shorter[:common], strict=True))
