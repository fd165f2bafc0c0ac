"""DoRA (Liu et al. 2024, arXiv 2402.09353): a trained magnitude beside LoRA's direction.

`W' = m (W0 + s B A) / ||W0 + s B A||`, the norm taken per output channel and held constant in backward (the paper's
section 4.3, and PEFT's way). m starts at that same norm, computed by the same operations, so a fresh factor is 1
exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.lora.layers.functional import lora_delta

# Rows are taken in blocks of this many elements, so that no dense update of W0's size stands in memory.
BLOCK = 2**22


def channel_norms(weight: Tensor, dim: int = 0) -> Tensor:
    """Euclidean norms over all dimensions but `dim`; returns (weight.shape[dim],)."""
    norms: Tensor = torch.linalg.vector_norm(weight.movedim(dim, 0).flatten(1), dim=1)
    return norms


@torch.no_grad()
def updated_row_norms(weight: Tensor, factors: list[tuple[Tensor, Tensor, float]], dtype: torch.dtype) -> Tensor:
    """Norms of the rows of `W0 + sum s B A` over the (A, B, s) in `factors`, without a gradient.

    Shapes: weight (m, k), A (r, k), B (m, r); returns (m,).
    """
    rows = max(1, BLOCK // max(1, weight.shape[1]))
    norms = []
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        moved = weight[part].to(dtype)
        if factors:
            moved = moved + sum_of_deltas([(A, B[part], scale) for A, B, scale in factors], dtype)
        norms.append(channel_norms(moved))
    return torch.cat(norms)


def sum_of_deltas(factors: list[tuple[Tensor, Tensor, float]], dtype: torch.dtype) -> Tensor:
    """`sum s B A`: terms that differ only in the sign of s cancel to exact zeros."""
    first, *rest = factors
    delta = lora_delta(*first, dtype)
    for factor in rest:
        delta = delta + lora_delta(*factor, dtype)
    return delta


def dora_factor(magnitude: Tensor, norms: Tensor) -> Tensor:
    """`m / ||W0 + s B A||`; 1 for a channel of zeros, which has no direction yet."""
    there = norms > 0
    return torch.where(there, magnitude / torch.where(there, norms, 1.0), 1.0)


def rescale(out: Tensor, update: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """`factor (W0 x + update) + bias`, from the base's `out = W0 x + bias`.

    Written as a correction to `out`, so that a factor of 1 and an update of 0 leave every bit of it. `factor` and
    `bias` broadcast against `out`.
    """
    plain = out if bias is None else out - bias.to(out.dtype)
    return out + (factor - 1).to(out.dtype) * plain + factor.to(out.dtype) * update


def dora_update(weight: Tensor, delta: Tensor, factor: Tensor, dim: int = 0) -> Tensor:
    """`W' - W0` for a merge, in the dtype of `delta`: (factor - 1) W0 + factor delta, factor along `dim`."""
    shape = [1] * weight.dim()
    shape[dim] = -1
    factor = factor.to(delta.dtype).view(shape)
    return (factor - 1) * weight.to(delta.dtype) + factor * delta
