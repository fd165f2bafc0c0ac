"""DoRA (Liu et al. 2024, arXiv 2402.09353): a trained magnitude beside LoRA's direction.

`W' = m (W0 + s B A) / ||W0 + s B A||`, the norm taken per output channel and constant in backward (the paper's section
4.3, as in PEFT). m starts at that same norm, computed by the same operations, so that a fresh factor is exactly 1.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def channel_norms(parts: Iterable[Tensor], dim: int, part_dim: int | None) -> Tensor:
    """Euclidean norms of a weight's channels over all dimensions but `dim`; returns (channels,).

    The weight comes in parts along `part_dim`, so that no copy of its size is in memory.
    """
    norms = [torch.linalg.vector_norm(part.movedim(dim, 0).flatten(1), dim=1) for part in parts]
    if len(norms) == 1 or part_dim == dim:
        return torch.cat(norms)
    across: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return across


def dora_factor(magnitude: Tensor, norms: Tensor) -> Tensor:
    """`m / ||W0 + s B A||`; 1 for a channel of zeros, which has no direction."""
    has_direction = norms > 0
    return torch.where(has_direction, magnitude / torch.where(has_direction, norms, 1.0), 1.0)


def rescale(out: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """`factor (out - bias) + bias`, for `out = W0 x + update + bias`.

    Written as a correction to `out`, so that a factor of 1 leaves every bit. All three broadcast.
    """
    without_bias = out if bias is None else out - bias.to(out.dtype)
    return torch.addcmul(out, without_bias, (factor - 1).to(out.dtype))


def dora_update(weight: Tensor, delta: Tensor, factor: Tensor, dim: int) -> Tensor:
    """`W' - W0` for a merge: (factor - 1) W0 + factor delta, both in one dtype, factor along `dim`."""
    factor = factor.to(delta.dtype).view(-1, *[1] * (weight.dim() - 1)).movedim(0, dim)
    return (factor - 1) * weight + factor * delta
