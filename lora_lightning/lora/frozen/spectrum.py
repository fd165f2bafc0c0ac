"""What an update `s B A` is made of, by linear algebra on its factors: B A, of W0's size, is never formed.

With B = Q_B R_B and A^T = Q_A R_A (QR) and the SVD `R_B R_A^T = u S v^T` of a matrix r by r, the update's singular
value decomposition is `(Q_B u) (s S) (Q_A v)^T`. All in float64, on the CPU.

Measures are those of section 7 of the paper (Hu et al. 2021, arXiv 2106.09685). Shapes: A (r, k), B (m, r), W0 (m, k).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
EXACT_SIDE = 1024
"""Smaller side of a W0 up to which its own singular values are found exactly; above, by subspace iteration."""


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The thin singular value decomposition of an update; directions that are zero but for rounding are left out."""

    U: Tensor
    """(m, q): what it writes to."""
    S: Tensor
    """(q,): singular values of `s B A`, falling."""
    V: Tensor
    """(k, q): what it reads."""


@torch.no_grad()
def spectrum(A: Tensor, B: Tensor, scale: float = 1.0) -> Spectrum:
    """The singular value decomposition of `s B A`."""
    A, B = _double(A), _double(B)
    left, upper = torch.linalg.qr(B)
    right, lower = torch.linalg.qr(A.mT)
    u, S, vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    q = _numerical_rank(S, max(A.shape[1], B.shape[0]))
    return Spectrum(U=left @ u[:, :q] * math.copysign(1.0, scale), S=S[:q] * abs(scale), V=right @ vh[:q].mT)


@torch.no_grad()
def directions(factor: Tensor) -> tuple[Tensor, Tensor]:
    """The left singular vectors (n, q) of a factor (n, r) and its singular values (q,).

    Of `A.T` they are the right singular vectors of A, from which the paper takes its similarities.
    """
    Q, R = torch.linalg.qr(_double(factor))
    u, S, _ = torch.linalg.svd(R)
    q = _numerical_rank(S, factor.shape[0])
    return Q @ u[:, :q], S[:q]


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _numerical_rank(S: Tensor, side: int) -> int:
    """How many singular values are more than what rounding in float64 leaves of zero."""
    return int((S[0] * EPS * side < S).sum()) if len(S) else 0


# Of singular values S (q,).


def frobenius(S: Tensor) -> float:
    """`||s B A||_F`."""
    return float(torch.linalg.vector_norm(S))


def stable_rank(S: Tensor) -> float:
    """`||.||_F^2 / ||.||_2^2`: from 1 for one direction to q for q that are equally strong; 0 of a zero update."""
    return float(S.square().sum() / S[0].square()) if len(S) else 0.0


def energy(S: Tensor) -> Tensor:
    """(q,): the share of `||.||_F^2` that the first 1, 2, ... directions hold."""
    squares = S.square()
    return squares.cumsum(0) / squares.sum() if len(S) else squares


def smallest_rank(S: Tensor, share: float) -> int:
    """The smallest k whose top k directions hold `share` of the energy; 0 of a zero update."""
    held = energy(S)
    # Summing rounds: all of the energy is held by all directions, and 0.95 by two of which one holds 0.95.
    return min(int((held < share * (1 - 4 * EPS)).sum()) + 1, len(S)) if len(S) else 0


# Subspaces.


def similarity(U1: Tensor, U2: Tensor) -> Tensor:
    """`phi(i, j) = ||U1_i^T U2_j||_F^2 / min(i, j)` of the first i and the first j columns, at [i - 1, j - 1].

    From 0, apart, to 1, one inside the other (the paper's equation 4). U1 (n, q1) and U2 (n, q2) have orthonormal
    columns in the order of their singular values; returns (q1, q2).
    """
    return accumulated((U1.mT @ U2).square())


def accumulated(squares: Tensor) -> Tensor:
    """`phi` from the squares (q1, q2) of the products of single directions."""
    rows = torch.arange(1, squares.shape[0] + 1, dtype=squares.dtype).unsqueeze(1)
    columns = torch.arange(1, squares.shape[1] + 1, dtype=squares.dtype)
    return squares.cumsum(0).cumsum(1) / torch.minimum(rows, columns)


def chance(i: int, j: int, n: int) -> float:
    """The mean of `phi(i, j)` of two subspaces of n dimensions that are drawn at random."""
    return max(i, j) / n


# Against W0.


@torch.no_grad()
def projected(U: Tensor, W0: Tensor, V: Tensor, dtype: torch.dtype = torch.float64) -> float:
    """`||U^T W0 V||_F`: how much of W0 lies in the directions of an update. On W0's device, in `dtype`."""
    product = U.to(W0.device, dtype).mT @ W0.detach().to(dtype)
    return float(torch.linalg.matrix_norm(product @ V.to(W0.device, dtype)))


@torch.no_grad()
def own_norm(W0: Tensor, r: int) -> float:
    """`||U^T W0 V||_F` in W0's own top r directions, which is the norm of its r largest singular values.

    Exact up to a smaller side of 1,024; above by eight subspace iterations (Halko et al. 2009, arXiv 0909.4061), which
    come from below and miss less than a percent. The caller's random state stays.
    """
    W0 = _double(W0)
    if min(W0.shape) <= EXACT_SIDE:
        return float(torch.linalg.vector_norm(torch.linalg.svdvals(W0)[:r]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, S, _ = torch.svd_lowrank(W0, q=min(2 * r + 8, *W0.shape), niter=8)
    return float(torch.linalg.vector_norm(S[:r]))


def random_norm(W0_norm: float, r: int, shape: tuple[int, int]) -> float:
    """The root of the mean of `||U^T W0 V||_F^2` over random U and V: `r ||W0||_F / sqrt(m k)`.

    Table 7 draws them; with W_q of GPT-3, ||W_q||_F = 61.95 and m = k = 12,288, both give 0.02 at r = 4.
    """
    return min(r, *shape) * W0_norm / math.sqrt(shape[0] * shape[1])


def drawn_norm(W0: Tensor, r: int, seed: int = 0) -> float:
    """`||U^T W0 V||_F` for one draw, the singular directions of random matrices, as in Table 7."""
    generator = torch.Generator().manual_seed(seed)
    frames = [torch.randn(n, min(r, *W0.shape), generator=generator, dtype=torch.float64) for n in W0.shape]
    U, V = (torch.linalg.qr(frame)[0] for frame in frames)
    return projected(U, W0, V)
