"""Factors of updates `s B A`, and the spectrum of an update without forming B A, which has W0's size.

With B = Q_B R_B and A^T = Q_A R_A (QR) and the SVD `R_B R_A^T = u S v^T` of a matrix r by r, the update's singular
value decomposition is `(Q_B u) (s S) (Q_A v)^T`. All in float64, on the CPU. Shapes: A (r, k), B (m, r).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = torch.finfo(torch.float64).eps

Pair = tuple[Tensor, Tensor]
"""A (r, k) and B (m, r)."""


def subtract_init(pair: Pair, A0: Tensor | None, B0: Tensor | None) -> Pair:
    """The factors of `B A - B0 A0`; those of `B A` where no init is subtracted."""
    A, B = pair
    return pair if A0 is None or B0 is None else (torch.cat([A, A0]), torch.cat([B, -B0], dim=1))


def pad_pair(pair: Pair, more: int) -> Pair:
    """The same update, with `more` rows of zeros in A and columns in B."""
    return (F.pad(pair[0], (0, 0, 0, more)), F.pad(pair[1], (0, more))) if more else pair


class Spectrum(NamedTuple):
    """The thin singular value decomposition of an update, without directions that are zero up to rounding.

    U (m, q) are directions of outputs, S (q,) the singular values of `s B A` in falling order, V (k, q) directions of
    inputs.
    """

    U: Tensor
    S: Tensor
    V: Tensor


@torch.no_grad()
def spectrum(A: Tensor, B: Tensor, scale: float = 1.0) -> Spectrum:
    """The singular value decomposition of `s B A`."""
    A, B = to_float64(A), to_float64(B)
    left, upper = torch.linalg.qr(B)
    right, lower = torch.linalg.qr(A.mT)
    u, S, vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    q = numerical_rank(S, max(A.shape[1], B.shape[0]))
    return Spectrum(U=left @ u[:, :q] * math.copysign(1.0, scale), S=S[:q] * abs(scale), V=right @ vh[:q].mT)


def to_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64 on the CPU, without gradients."""
    return tensor.detach().to("cpu", torch.float64)


def numerical_rank(S: Tensor, side: int) -> int:
    """The number of singular values that are not zero up to rounding in float64."""
    return int((S[0] * EPS * side < S).sum()) if len(S) else 0
