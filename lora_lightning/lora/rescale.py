"""DoRA's rescaling of a layer's finished sum, `f (h - b) + b`, as a function that keeps one tensor of its width.

`dora.rescale` is the plain form; it keeps the base's output and the update apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 2**17
"""Elements that are worked on at once on a CPU, so that they stay in its cache."""


def rescale_(out: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """`factor (out - bias) + bias`, into `out` where there is a bias; a factor of 1 leaves every bit.

    `factor` and `bias` have the shape of the last dimensions of `out`, or 1 there. The bias gets no gradient: that of
    the result with respect to it is 1, whatever the factor.
    """
    rescaled: Tensor = _Rescale.apply(out, (factor - 1).to(out.dtype), bias)[0]  # type: ignore[no-untyped-call]
    return rescaled


class _Rescale(torch.autograd.Function):
    """`h + (f - 1) (h - b)`, and h - b as a second output, so that what is kept is a part of the graph."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, change: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.without_bias = bias is None
        if bias is None:
            ctx.save_for_backward(h if ctx.needs_input_grad[1] else None, change)
            return torch.addcmul(h, h, change), None
        direction = h - bias.to(h.dtype)
        h.addcmul_(direction, change)
        ctx.mark_dirty(h)
        ctx.save_for_backward(direction if ctx.needs_input_grad[1] else None, change)
        return h, direction

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (direction, change), (g, g_direction) = ctx.saved_tensors, grads
        needs_h, needs_change = ctx.needs_input_grad[:2]
        if g is None:
            return g_direction, None, None
        if torch.is_grad_enabled():
            dh: Tensor | None = torch.addcmul(g, g, change)
            found = (g * direction).sum_to_size(change.shape) if needs_change else None
        else:
            g = g if change.dim() > 1 else g.contiguous()
            dh, found = _in_blocks(g, direction, change, needs_h=needs_h)
        return (dh if dh is None or g_direction is None else dh + g_direction), found, None


def _in_blocks(
    g: Tensor, direction: Tensor | None, change: Tensor, *, needs_h: bool
) -> tuple[Tensor | None, Tensor | None]:
    """`f g`, and the sum of `g direction` over all but the channels, some rows at a time."""
    dh = torch.empty_like(g) if needs_h else None
    shape = (-1, *g.shape[-change.dim() :])
    dtype = torch.promote_types(g.dtype, torch.float32)
    total = torch.zeros(change.shape, dtype=dtype, device=g.device)
    summed = [0, *(d + 1 for d in range(change.dim()) if change.shape[d] == 1)]
    g, there, to = g.view(shape), *(None if t is None else t.view(shape) for t in (direction, dh))
    count = len(g) if g.device.type != "cpu" else max(1, BLOCK // max(1, g[:1].numel()))
    for start in range(0, len(g), max(1, count)):
        rows = slice(start, start + count)
        if to is not None:
            torch.addcmul(g[rows], g[rows], change, out=to[rows])
        if there is not None:
            total += (g[rows] * there[rows]).sum(summed, dtype=dtype).view(change.shape)
    return dh, None if there is None else total.to(change.dtype)
