"""Norms of the rows of `W0 + s B A` from what is of rank's size, without the dense update.

`||w + s A^T b||^2 = ||w||^2 + 2 s (A w) b + s^2 b^T (A A^T) b` for each row w of W0 and b of B: W0 is read by one thin
product and for its own norms, which are not kept: no write into W0, such as through `.data`, can make them stale. B = 0
gives those norms to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.lora.traced import is_traced

CANCELLED = 1e-2
"""Where a row's square shrinks below this share of W0's, the difference of large numbers has lost too many digits."""
BLOCK = 2**18
"""Elements of W0 that are cast at once where it is narrower than the norms: they stay in a CPU's cache."""


@torch.no_grad()
def thin_row_norms(norms: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor | None:
    """Norms of the rows of `W0 + s B A`, in the dtype of `norms`; None where a row cancels too far for this way.

    Shapes: norms (m,) of W0 (m, k), A (r, k), B (m, r).
    """
    A, B = A.to(norms.dtype), B.to(norms.dtype)
    square = norms.double().square()
    cross = (_across(weight, A) * B).sum(1, dtype=torch.float64)
    inner = ((B @ (A @ A.t())) * B).sum(1, dtype=torch.float64)
    moved = square + 2 * scale * cross + scale**2 * inner
    if not is_traced() and bool((moved < CANCELLED * square).any()):
        return None
    return moved.sqrt().to(norms.dtype)


def _across(weight: Tensor, A: Tensor) -> Tensor:
    """`W0 A^T` (m, r) in the dtype of A."""
    if weight.dtype == A.dtype:
        return torch.mm(A, weight.t()).t()  # many times quicker than the transposed product where W0 is a transpose
    if weight.is_contiguous():
        parts = torch.split(weight, max(1, BLOCK // max(1, weight.shape[1])))
        return torch.cat([torch.mm(part.to(A.dtype), A.t()) for part in parts])
    total, count = A.new_zeros(weight.shape[0], A.shape[0]), max(1, BLOCK // max(1, weight.shape[0]))
    for part, a in zip(torch.split(weight.t(), count), torch.split(A.t(), count), strict=True):  # a transpose's rows
        total.addmm_(part.to(A.dtype).t(), a)
    return total
