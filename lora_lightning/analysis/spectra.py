"""W0 and updates `s B A` as matrices, and measures of their spectra and subspaces.

A layer is one matrix (m, k), except a stack of experts and an attention with three weights, which are several. k is the
inputs times the kernel of a convolution, of all groups, and the number of rows of an embedding.

Measures are those of section 7 of the paper (Hu et al. 2021, arXiv 2106.09685). Shapes: A (r, k), B (m, r), W0 (m, k).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_lightning.lora.frozen.quantization import plain_weight
from lora_lightning.lora.frozen.spectrum import EPS, Pair, numerical_rank, subtract_init, to_float64
from lora_lightning.lora.layers import AdaptedLayer, LoRAConv1D, LoRAMultiheadAttention, LoRAParameter, kind_of
from lora_lightning.lora.layers.conv import CONVS
from lora_lightning.lora.layers.functional import without_groups

EXACT_SIDE = 1024
"""Smaller side of W0 up to which its singular values are computed exactly; above, by subspace iteration."""


# Layers of every kind as matrices.


def matrix_pair(A: Tensor, B: Tensor) -> Pair:
    """A and B in PEFT's layout as matrices. With groups, B becomes block diagonal."""
    A, B = A.flatten(1), B.flatten(1)
    groups = A.shape[0] // B.shape[1]
    if groups > 1:
        B = torch.block_diag(*B.chunk(groups))  # type: ignore[no-untyped-call]
    return A, B


def update_pairs(layer: AdaptedLayer) -> list[Pair]:
    """The factors (A, B) of each matrix of a layer's update, without s. A fused weight is one matrix."""
    if isinstance(layer, LoRAParameter) or (isinstance(layer, LoRAMultiheadAttention) and layer.in_proj_weight is None):
        return layer.factor_pairs()
    tensors = layer.to_peft()
    return [subtract_init(matrix_pair(tensors["lora_A"], tensors["lora_B"]), layer.lora_A0, layer.lora_B0)]


def base_matrices(layer: AdaptedLayer, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> list[Tensor]:
    """W0 as the matrices (m, k) of `update_pairs`, in its dtype, dequantized; `whole` gathers a sharded tensor."""
    owner = layer.lora_owner
    if not isinstance(layer, LoRAParameter | LoRAMultiheadAttention):
        return weight_matrices(layer, whole(plain_weight(layer).detach()))
    parts = layer.adapted_parameters().values()
    stacked = isinstance(layer, LoRAParameter)
    return [matrix for part in parts for matrix in weight_matrices(owner, whole(part.detach()), stacked=stacked)]


def weight_matrices(module: nn.Module, weight: Tensor, *, stacked: bool = False) -> list[Tensor]:
    """A module's weight as matrices (m, k), also where it is stored transposed; `stacked` for a bare parameter."""
    if stacked:
        turned = bool(getattr(module, "is_transposed", False)) and weight.dim() == 3
        return list((weight.mT if turned else weight).unbind()) if weight.dim() == 3 else [weight]
    if isinstance(module, nn.Embedding) or kind_of(module) is LoRAConv1D:
        return [weight.mT]
    if isinstance(module, CONVS):
        return [without_groups(weight, module.groups).flatten(1)]
    return [weight]


# Of singular values S (q,).


def frobenius(S: Tensor) -> float:
    """`||s B A||_F`."""
    return float(torch.linalg.vector_norm(S))


def stable_rank(S: Tensor) -> float:
    """`||.||_F^2 / ||.||_2^2`: 1 for one direction, q for q equally strong directions, 0 for a zero update."""
    return float(S.square().sum() / S[0].square()) if len(S) else 0.0


def energy(S: Tensor) -> Tensor:
    """(q,): the share of `||.||_F^2` that the first 1, 2, ... directions hold."""
    squares = S.square()
    return squares.cumsum(0) / squares.sum() if len(S) else squares


def smallest_rank(S: Tensor, share: float) -> int:
    """The smallest k whose top k directions hold `share` of the energy; 0 for a zero update."""
    shares = energy(S)
    # A tolerance for rounding in the sum, without which a share of exactly 0.95 or 1 may need one direction more.
    return min(int((shares < share * (1 - 4 * EPS)).sum()) + 1, len(S)) if len(S) else 0


# Subspaces.


@torch.no_grad()
def directions(factor: Tensor) -> tuple[Tensor, Tensor]:
    """The left singular vectors (n, q) of a factor (n, r) and its singular values (q,).

    Of `A.T` they are the right singular vectors of A, from which the paper takes its similarities.
    """
    Q, R = torch.linalg.qr(to_float64(factor))
    u, S, _ = torch.linalg.svd(R)
    q = numerical_rank(S, factor.shape[0])
    return Q @ u[:, :q], S[:q]


def similarity(U1: Tensor, U2: Tensor) -> Tensor:
    """`phi(i, j) = ||U1_i^T U2_j||_F^2 / min(i, j)` of the first i and the first j columns, at [i - 1, j - 1].

    phi is 0 for orthogonal subspaces and 1 where one contains the other (the paper's equation 4). U1 (n, q1) and
    U2 (n, q2) have orthonormal columns in the order of their singular values; returns (q1, q2).
    """
    return accumulate_similarity((U1.mT @ U2).square())


def accumulate_similarity(squares: Tensor) -> Tensor:
    """`phi` from the squared inner products (q1, q2) of single directions."""
    rows = torch.arange(1, squares.shape[0] + 1, dtype=squares.dtype).unsqueeze(1)
    columns = torch.arange(1, squares.shape[1] + 1, dtype=squares.dtype)
    return squares.cumsum(0).cumsum(1) / torch.minimum(rows, columns)


def random_similarity(i: int, j: int, n: int) -> float:
    """The mean of `phi(i, j)` of two random subspaces in n dimensions."""
    return max(i, j) / n


# Against W0.


@torch.no_grad()
def projection_norm(U: Tensor, W0: Tensor, V: Tensor, dtype: torch.dtype = torch.float64) -> float:
    """`||U^T W0 V||_F`, the part of W0 in the directions of an update. On W0's device, in `dtype`."""
    product = U.to(W0.device, dtype).mT @ W0.detach().to(dtype)
    return float(torch.linalg.matrix_norm(product @ V.to(W0.device, dtype)))


@torch.no_grad()
def top_norm(W0: Tensor, r: int) -> float:
    """`||U^T W0 V||_F` in W0's top r directions, which is the norm of its r largest singular values.

    Exact up to a smaller side of 1,024; above by eight subspace iterations (Halko et al. 2009, arXiv 0909.4061), which
    give a lower bound within a percent. The caller's random state does not change.
    """
    W0 = to_float64(W0)
    if min(W0.shape) <= EXACT_SIDE:
        return float(torch.linalg.vector_norm(torch.linalg.svdvals(W0)[:r]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, S, _ = torch.svd_lowrank(W0, q=min(2 * r + 8, *W0.shape), niter=8)
    return float(torch.linalg.vector_norm(S[:r]))


def expected_norm(W0_norm: float, r: int, shape: tuple[int, int]) -> float:
    """The root of the mean of `||U^T W0 V||_F^2` over random U and V: `r ||W0||_F / sqrt(m k)`.

    Table 7 samples it; with W_q of GPT-3, ||W_q||_F = 61.95 and m = k = 12,288, both give 0.02 at r = 4.
    """
    return min(r, *shape) * W0_norm / math.sqrt(shape[0] * shape[1])


def sampled_norm(W0: Tensor, r: int, seed: int = 0) -> float:
    """`||U^T W0 V||_F` for one sample of U and V, the singular directions of random matrices, as in Table 7."""
    generator = torch.Generator().manual_seed(seed)
    frames = [torch.randn(n, min(r, *W0.shape), generator=generator, dtype=torch.float64) for n in W0.shape]
    U, V = (torch.linalg.qr(frame)[0] for frame in frames)
    return projection_norm(U, W0, V)
