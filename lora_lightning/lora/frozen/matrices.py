"""Every kind of layer as matrices: its update as products of thin factors, and W0 as what these are added to.

A layer is one matrix (m, k), but for a stack of experts and an attention of three weights, which are several. A
convolution's k are its inputs times its kernel, of all groups; an embedding's are its rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_lightning.lora.frozen.quantization import plain_weight
from lora_lightning.lora.layers import AdaptedLayer, LoRAMultiheadAttention, LoRAParameter
from lora_lightning.lora.layers.conv import CONVS
from lora_lightning.lora.layers.linear import CONV1D

Pair = tuple[Tensor, Tensor]
"""A (r, k) and B (m, r)."""


def matrix_pair(A: Tensor, B: Tensor) -> Pair:
    """A and B in PEFT's layout as matrices. With groups, B gets zeros where one does not see another's rank."""
    A, B = A.flatten(1), B.flatten(1)
    groups = A.shape[0] // B.shape[1]
    if groups > 1:
        B = torch.block_diag(*B.chunk(groups))  # type: ignore[no-untyped-call]
    return A, B


def stack_pairs(A: Tensor, B: Tensor, count: int) -> list[Pair]:
    """The pairs of a stack's entries: rows of A lie together, columns of B are `rank * count + entry`."""
    columns = torch.unflatten(B, 1, (-1, count)).unbind(2)
    return list(zip(A.chunk(count), columns, strict=True))


def less_start(pair: Pair, A0: Tensor | None, B0: Tensor | None) -> Pair:
    """`B A - B0 A0` as one product, where a start is subtracted."""
    A, B = pair
    return pair if A0 is None or B0 is None else (torch.cat([A, A0]), torch.cat([B, -B0], dim=1))


def update_pairs(layer: AdaptedLayer) -> list[Pair]:
    """The factors (A, B) of each matrix of a layer's update, without s. Parts of a fused weight are one matrix."""
    if isinstance(layer, LoRAParameter) or (isinstance(layer, LoRAMultiheadAttention) and layer.in_proj_weight is None):
        return layer.factor_pairs()
    own = layer.to_peft()
    return [less_start(matrix_pair(own["lora_A"], own["lora_B"]), layer.lora_A0, layer.lora_B0)]


def base_matrices(layer: AdaptedLayer, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> list[Tensor]:
    """W0 of each of them, (m, k), in its own dtype; dequantised where the base is quantised.

    Args:
        whole: brings a sharded tensor together.
    """
    owner = layer.lora_owner
    if not isinstance(layer, LoRAParameter | LoRAMultiheadAttention):
        return weight_matrices(layer, whole(plain_weight(layer).detach()))
    parts = layer.adapted_parameters(owner, layer.lora_settings).values()
    stacked = isinstance(layer, LoRAParameter)
    return [matrix for part in parts for matrix in weight_matrices(owner, whole(part.detach()), stacked=stacked)]


def weight_matrices(module: nn.Module, weight: Tensor, *, stacked: bool = False) -> list[Tensor]:
    """A module's weight as (m, k), whatever way it lies there; `stacked` of a bare parameter."""
    if stacked:
        turned = bool(getattr(module, "is_transposed", False)) and weight.dim() == 3
        return list((weight.mT if turned else weight).unbind()) if weight.dim() == 3 else [weight]
    if isinstance(module, nn.Embedding) or _is_conv1d(module):
        return [weight.mT]
    if isinstance(module, CONVS):
        return [_ungrouped(weight, module.groups) if module.groups > 1 else weight.flatten(1)]
    return [weight]


def _is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' linear layer that holds its transpose, adapted or plain."""
    return CONV1D in {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}


def _ungrouped(weight: Tensor, groups: int) -> Tensor:
    """W0 of a convolution with groups as one that sees all channels, with zeros at those of other groups."""
    out, channels, *kernel = weight.shape
    wide = weight.new_zeros(groups, out // groups, groups, channels, *kernel)
    own = torch.arange(groups)
    wide[own, :, own] = torch.unflatten(weight, 0, (groups, -1))
    return wide.flatten(2, 3).flatten(0, 1).flatten(1)
