"""The gradient of a bias that trains, for an output into which its value has gone already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def with_bias_gradient(out: Tensor, bias: Tensor, dim: int = -1) -> Tensor:
    """`out` as it is; in backward `bias` (m,) gets its gradient, summed over all but `dim` (counted from the end)."""
    passed: Tensor = _Passed.apply(out, bias, dim)  # type: ignore[no-untyped-call]
    return passed


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, bias: Tensor, dim: int) -> Tensor:
        ctx.dtype, ctx.dim = bias.dtype, dim
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        g = grads[0]
        others = [d for d in range(g.dim()) if d != g.dim() + ctx.dim]
        return g, (g.sum(others) if others else g).to(ctx.dtype), None
