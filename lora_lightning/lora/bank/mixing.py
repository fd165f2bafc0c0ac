"""Weighted combinations of updates, as pure functions of tensors.

An update is `B A` with A (r, k) and B (m, r). Task arithmetic is `sum_i w_i B_i A_i`; TIES (Yadav et al. 2023,
arXiv 2306.01708) and DARE (Yu et al. 2024, arXiv 2311.03099) are defined on task vectors, which are the updates
themselves and not their factors: these work on dense updates, flattened, one row for each adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]
"""A (r, k) and B (m, r)."""
Loss = tuple[float, float]
"""Squares of Frobenius norms: of what is missing, and of what was asked for."""


def concatenated(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """`[A_1; A_2; ...]` and `[w_1 B_1, w_2 B_2, ...]`, whose product is the weighted sum, with nothing lost."""
    A = torch.cat([A for A, _ in pairs])
    return A, torch.cat([B * w for (_, B), w in zip(pairs, weights, strict=True)], dim=1)


def truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Pair, Loss]:
    """The best `B A` of rank `rank` (Eckart and Young), and what it lacks.

    Through the QR of the factors: never larger than they are, and r by r where the SVD is taken.
    """
    left, upper = torch.linalg.qr(B)
    right, lower = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    return _balanced(left @ U, S, Vh @ right.mT, rank)


def factored(dense: Tensor, rank: int | None) -> tuple[Pair, Loss]:
    """A dense update (m, k) as factors: exactly, with the identity as the one, or as its best of `rank`."""
    if rank is not None:
        U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
        return _balanced(U, S, Vh, rank)
    m, k = dense.shape
    one = torch.eye(min(m, k), dtype=dense.dtype, device=dense.device)
    return ((dense, one) if m <= k else (one, dense)), (0.0, float(dense.square().sum()))


def _balanced(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Pair, Loss]:
    root, squares = S[:rank].sqrt(), S.square()
    return (root.unsqueeze(1) * Vh[:rank], U[:, :rank] * root), (float(squares[rank:].sum()), float(squares.sum()))


def padded(pair: Pair, rank: int) -> Pair:
    """The same update with zeros up to `rank`."""
    more = rank - pair[0].shape[0]
    return (F.pad(pair[0], (0, 0, 0, more)), F.pad(pair[1], (0, more))) if more else pair


# On dense updates: (number of adapters, entries).


def trimmed(updates: Tensor, density: float) -> Tensor:
    """Each update with the share `density` of its entries that is largest in magnitude, zero elsewhere."""
    sizes, entries = updates.abs(), updates.shape[1]
    least = sizes.kthvalue(entries - max(1, int(density * entries)) + 1, dim=1, keepdim=True).values
    return torch.where(sizes >= least, updates, torch.zeros_like(updates))


def dropped(updates: Tensor, density: float, draws: Tensor) -> Tensor:
    """DARE: each entry is kept with probability `density`, where its draw from [0, 1) is below, and divided by it."""
    return torch.where(draws < density, updates / density, torch.zeros_like(updates))


def summed(updates: Tensor, weights: Tensor) -> Tensor:
    """`sum_i w_i tau_i`."""
    return (updates * weights.unsqueeze(1)).sum(0)


def elected(updates: Tensor, weights: Tensor) -> Tensor:
    """TIES after trimming: of each entry the stronger sign is elected, and the weighted updates that have it averaged.

    Zeros have no sign and are not counted; where both signs are equally strong it is plus. The weights come after the
    election, as in PEFT.
    """
    sign = torch.where(updates.sum(0) >= 0, 1.0, -1.0).to(updates.dtype)
    agrees = updates.sign() == sign
    return summed(updates * agrees, weights) / agrees.sum(0).clamp(min=1)
