"""The arithmetic of LoRA as pure functions of tensors.

Shapes: `n` rows, `k` inputs, `m` outputs, rank `r`; x is (..., k), W0 is (m, k), A is (r, k), B is (m, r).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lightning.lora.targets.fused_projections import Slices


def lora_update(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`s (x A^T) B^T` (..., m), in the dtype of x: the rank-sized factors are cast, never the input."""
    return F.linear(F.linear(x, A.to(x.dtype)) * scale, B.to(x.dtype))


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or wider where a tensor is: the dtype in which weights are added."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def lora_delta(A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`s B A`, the dense update (m, k), for a merge; of stacks (e, m, r) and (e, r, k) one for each entry."""
    return (B.to(dtype) @ A.to(dtype)) * scale


def subtracted_factors(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """`B A - B0 A0` as one product of rank 2r: `[B, B - B0] [A - A0; A0]`, which is exactly 0 at the start.

    Returns (2r, k) and (m, 2r).
    """
    return torch.cat([A - A0, A0]), torch.cat([B, B - B0], dim=1)


# Parts of a fused projection: with p chosen parts, A is (p r, k) and B (the parts' rows, r), in the parts' order.


def block_rows(B: Tensor, slices: Slices) -> Tensor:
    """B of the chosen parts (their rows, r) as a B (m, p r) of the whole layer, for the same A.

    Each part has r columns, which are zero outside of its rows: `block_rows(B) A` is exactly the update.
    """
    r, count = B.shape[1], len(slices.taken)
    parts = iter(enumerate(torch.split(B, slices.taken_rows)))
    pieces = []
    for name, size in zip(slices.names, slices.sizes, strict=True):
        if name in slices.taken:
            i, part = next(parts)
            piece = F.pad(part, (i * r, (count - 1 - i) * r))
        else:
            piece = B.new_zeros(slices.heads * size, count * r)
        pieces.append(torch.unflatten(piece, 0, (slices.heads, size)))
    return torch.cat(pieces, dim=1).flatten(0, 1)


def unblock_rows(block: Tensor, slices: Slices) -> Tensor:
    """The inverse of `block_rows`."""
    r = block.shape[1] // len(slices.taken)
    pieces = torch.split(torch.unflatten(block, 0, (slices.heads, -1)), list(slices.sizes), dim=1)
    taken = [p.flatten(0, 1) for name, p in zip(slices.names, pieces, strict=True) if name in slices.taken]
    return torch.cat([part[:, i * r : (i + 1) * r] for i, part in enumerate(taken)])


def without_groups(weight: Tensor, groups: int) -> Tensor:
    """A kernel (out, in / groups, kernel...) as (out, in, kernel...), with zeros at the channels of other groups."""
    if groups == 1:
        return weight
    out, channels, *kernel = weight.shape
    wide = weight.new_zeros(groups, out // groups, groups, channels, *kernel)
    index = torch.arange(groups, device=weight.device)
    wide[index, :, index] = torch.unflatten(weight, 0, (groups, -1))
    return wide.flatten(2, 3).flatten(0, 1)


# Stacks of matrices, such as experts. PEFT's layout: A is (e r, in) with an expert's rows together, B is (out, r e)
# with column `rank * e + expert`.


def stack_factors(A: Tensor, B: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A (e, r, in) and B (e, out, r) of the `count` entries of a stack, as views."""
    return torch.unflatten(A, 0, (count, -1)), torch.unflatten(B, 1, (-1, count)).permute(2, 0, 1)
