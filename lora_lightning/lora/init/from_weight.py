"""Inits of A and B other than B = 0, in plain linear algebra.

Each returns factors (A, B) of a layer with W0 (m, k), rank r and scale s. Where B A is not zero the layer keeps them as
(A0, B0) and computes `W0 x + s (B A - B0 A0) x`, so that W0 and the first output do not change. A is (r, k), B (m, r).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_lightning.lora.config import FAST_PISSA
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.layers.functional import wide_dtype

Factors = tuple[Tensor, Tensor]

DATA_INITS = {
    "eva": "an iterable of batches that the model is called with",
    "lora_ga": "an iterable of batches that the model is called with and makes a loss of",
    "loftq": "the model before quantization, or its state dict",
}
"""Inits that need more than W0, and what."""

# LoRA-GA's stability constant, as in the paper's experiments and code (Wang et al. 2024, arXiv 2407.05000).
LORA_GA_GAMMA = 16.0


def is_from_weight(init: str) -> bool:
    """Whether the init is computed from W0 alone."""
    return init in _FROM_WEIGHT or FAST_PISSA.fullmatch(init) is not None


def is_subtracted(init: str) -> bool:
    """Whether the layer keeps and subtracts its first factors.

    eva does not, since B is 0; nor does loftq, whose first update corrects the quantization error.
    """
    return is_from_weight(init) or init == "lora_ga"


def refusal(init: str, r: int, shape: tuple[int, int]) -> str | None:
    """Why an init cannot be computed at this rank for a weight of this shape; None where it can."""
    if init == "orthogonal" and r % 2:
        return f"init 'orthogonal' splits an orthogonal matrix in two halves and needs an even r, got r={r}"
    if init == "lora_ga" and 2 * r > min(shape):
        return (
            f"init 'lora_ga' takes 2 r = {2 * r} singular directions of the gradient, which has {min(shape)}:"
            f" set r to {min(shape) // 2} or less"
        )
    return None


@torch.no_grad()
def factors_from_weight(init: str, weight: Tensor, r: int, scale: float) -> Factors:
    """The named init from W0, in float32 or wider."""
    weight = weight.detach().to(wide_dtype(weight))
    if fast := FAST_PISSA.fullmatch(init):
        return pissa(weight, r, scale, niter=int(fast[1]))
    return _FROM_WEIGHT[init](weight, r, scale)


def pissa(weight: Tensor, r: int, scale: float, niter: int | None = None) -> Factors:
    """The r largest singular triples of W0, `s B A = U_r S_r V_r^T` (Meng et al. 2024, arXiv 2404.02948).

    With `niter`, by that many subspace iterations of a randomized SVD (Halko et al. 2009, arXiv 0909.4061).
    """
    if niter is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(weight, q=r, niter=niter)
        Vh = V.T
    root = (S[:r] / scale).sqrt()
    return root.unsqueeze(1) * Vh[:r], U[:, :r] * root


def olora(weight: Tensor, r: int, scale: float) -> Factors:
    """B and A are the first r columns and rows of W0's QR (Buyukakyuz 2024, arXiv 2406.01775)."""
    Q, R = torch.linalg.qr(weight)
    return R[:r], Q[:, :r]


def orthogonal(weight: Tensor, r: int, scale: float) -> Factors:
    """Random A and B on the odd and even rows of one orthogonal matrix, so that `B A` is 0 up to rounding.

    From datta0.github.io/posts/rethink-lora-init; the factor 1/10 is that post's and PEFT's.
    """
    out_features, in_features = weight.shape
    Q, _ = torch.linalg.qr(weight.new_empty(r, r).normal_())
    left = weight.new_empty(out_features, r // 2).normal_()
    right = weight.new_empty(r // 2, in_features).normal_()
    return Q[0::2].T @ right / 10.0, left @ Q[1::2] / 10.0


def eva(directions: Tensor, weight: Tensor, r: int) -> Factors:
    """A is the r main directions (q, k) of the layer's inputs, B is zero (Paischer et al. 2024, arXiv 2410.07170)."""
    if directions.shape[0] < r:
        got = directions.shape[0]
        raise LoRAError(f"init 'eva' needs at least r={r} independent inputs of each layer, got {got}: give more data")
    return directions[:r], torch.zeros(weight.shape[0], r, dtype=weight.dtype, device=weight.device)


def lora_ga(gradient: Tensor, r: int) -> Factors:
    """A and B on the first and the next r singular directions of the loss's gradient in W0.

    Both are scaled by m^(1/4) / sqrt(gamma), so that the first step of training follows that of full fine-tuning
    (Wang et al. 2024, arXiv 2407.05000, theorem 3.1 and its stable scale).
    """
    # 4 r directions by 4 subspace iterations: the paper's own approximation.
    U, _, V = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
    size = gradient.shape[0] ** 0.25 / LORA_GA_GAMMA**0.5
    return V[:, :r].T * size, U[:, r : 2 * r] * size


def loftq(quantized: Tensor, original: Tensor, r: int, scale: float) -> Factors:
    """The best rank-r approximation of the quantization error: `s B A = (W - W0)_r`.

    This is one step of LoftQ (Li et al. 2023, arXiv 2310.08659), and does not change W0.
    """
    return pissa(original.to(quantized.dtype) - quantized, r, scale)


_FROM_WEIGHT: dict[str, Callable[[Tensor, int, float], Factors]] = {
    "orthogonal": orthogonal,
    "pissa": pissa,
    "olora": olora,
}
