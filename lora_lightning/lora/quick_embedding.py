"""`h = W0[ids] + s B A[:, ids]` as an autograd function: `functional.embedding_update` added into what was looked up.

Of A only the looked-up columns are read, and its gradient is added up where it lies, so that no transposed copy of A's
size is made. Kept for backward: z = s A[:, ids], and the mask of dropout as bytes.

Shapes: ids (...), n of them; A (r, rows), B (width, r), z (r, n).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_lightning.lora.again import differentiable_gradients
from lora_lightning.lora.drops import drawn


def add_looked_up_(
    out: Tensor, ids: Tensor, A: Tensor, B: Tensor, scale: float, *, padding_idx: int | None, dropout: float
) -> Tensor:
    """Add the update to `out` (..., width), in place. Dropout keeps or drops the whole update of an entry of ids."""
    drop = drawn(dropout)
    keep = None if drop is None else drop.keep(ids.reshape(1, -1))
    scale = scale if drop is None else scale * drop.scale
    added: Tensor = _AddLookedUp.apply(out, ids.reshape(-1).long(), A, B, scale, padding_idx, keep)  # type: ignore[no-untyped-call]
    return added


class _AddLookedUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        ids: Tensor,
        A: Tensor,
        B: Tensor,
        scale: float,
        padding_idx: int | None,
        keep: Tensor | None,
    ) -> Tensor:
        z = A.index_select(1, ids).to(out.dtype) * scale
        z = z if keep is None else z.mul_(keep)
        out.view(-1, out.shape[-1]).addmm_(z.t(), B.to(out.dtype).t())
        ctx.mark_dirty(out)
        ctx.save_for_backward(ids, z, A, B, keep)
        ctx.scale, ctx.padding_idx = scale, padding_idx
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (ids, z, A, B, keep), g = ctx.saved_tensors, grads[0]
        _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        dA = dB = None
        rows = g.reshape(-1, g.shape[-1])
        with torch.autocast(g.device.type, enabled=False):
            if torch.is_grad_enabled():
                dA, dB = differentiable_gradients(_plain(ctx, ids, keep, g.dtype), (A, B), (needs_a, needs_b), rows)
            else:
                dB = torch.mm(z, rows).t().to(B.dtype) if needs_b else None
                dA = _scattered(ctx, rows, ids, A, B, keep) if needs_a else None
        return g, None, dA, dB, None, None, None


def _scattered(ctx: Any, g: Tensor, ids: Tensor, A: Tensor, B: Tensor, keep: Tensor | None) -> Tensor:
    """The gradient of A (r, rows) from g (n, width)."""
    dz = torch.mm(B.to(g.dtype).t(), g.t()) * ctx.scale
    if keep is not None:
        dz = dz.mul_(keep)
    if ctx.padding_idx is not None:
        dz = dz.mul_(ids != ctx.padding_idx)
    return torch.zeros_like(A).scatter_add_(1, ids.expand(len(A), -1), dz.to(A.dtype))


def _plain(ctx: Any, ids: Tensor, keep: Tensor | None, dtype: torch.dtype) -> Any:
    """The update by operations that can be differentiated again."""

    scale: float = ctx.scale

    def plain(A: Tensor, B: Tensor) -> Tensor:
        z = torch.nn.functional.embedding(ids, A.t(), padding_idx=ctx.padding_idx).to(dtype) * scale
        z = z if keep is None else z * keep.t()
        return z @ B.to(dtype).t()

    return plain
