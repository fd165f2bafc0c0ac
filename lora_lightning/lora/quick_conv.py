"""`h = W0 * x + b + s B * (A * x)` as one autograd function: `functional.conv_update` in fewer passes over memory.

- What B does at each place, and what A does where the kernel is of size one, are thin matrix products (`channels.py`).
- The update is added into the base's own output, and A's share of dX into the base's.
- Kept for backward: x, and z = s A * x. Dropout comes from random bytes, drawn again in backward from a seed.

Shapes: x (n, in, size...), W0 (out, in / groups, kernel...), A (r, in / groups, kernel...), B (out, r / groups, 1...).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_lightning.lora.again import differentiable_gradients
from lora_lightning.lora.channels import (
    add_through_channels_,
    flat,
    in_order,
    sum_over_places,
    through_channels,
    unflat,
)
from lora_lightning.lora.drops import Dropout, drawn, kept


class Slide(NamedTuple):
    """How a kernel moves over x, which has been padded as far as that takes more than zeros on both sides."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def over(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution."""
        return torch.convolution(x, weight, bias, *self[:3], False, [0] * len(self.stride), self.groups)

    def back(self, g: Tensor, x: Tensor, weight: Tensor, *, dx: bool, dweight: bool) -> tuple[Any, Any]:
        """Its gradients with respect to x and the weight."""
        wanted = [dx, dweight, False]
        zeros = [0] * len(self.stride)
        return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
            g, x, weight, None, *self[:3], False, zeros, self.groups, wanted
        )[:2]

    def is_pointwise(self, kernel: torch.Size) -> bool:
        """Whether the output at a place is a matrix times the input there."""
        ones = {*kernel, *self.stride} == {1}
        return ones and not any(self.padding) and self.groups == 1


def quick_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, slide: Slide, dropout: float
) -> Tensor:
    """(n, out, size...), with dropout on the adapter's input. W0 and b get no gradient."""
    device = x.device.type
    mixed = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if mixed else x.dtype
    out: Tensor = _QuickConv.apply(x.to(dtype), weight, bias, A, B, scale, slide, drawn(dropout))  # type: ignore[no-untyped-call]
    return out


class _QuickConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        slide: Slide,
        drop: Dropout | None,
    ) -> Tensor:
        weight = weight.to(x.dtype)
        out = in_order(slide.over(x, weight, None if bias is None else bias.to(x.dtype)), slide.groups)
        scale = scale if drop is None else scale * drop.scale
        z = _down(_seen(x, drop), A.to(x.dtype) * scale, slide)
        add_through_channels_(out, B.flatten(1).to(x.dtype), z, slide.groups)
        ctx.save_for_backward(x, z, weight, A, B)
        ctx.scale, ctx.slide, ctx.drop = scale, slide, drop
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (x, z, weight, A, B), g = ctx.saved_tensors, grads[0]
        with torch.autocast(g.device.type, enabled=False):
            if torch.is_grad_enabled():
                needs = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
                dx, dA, dB = differentiable_gradients(_plain(ctx, weight), (x, A, B), needs, g)
            else:
                dx, dA, dB = _gradients(ctx, g, x, z, weight, A, B)
        return dx, None, None, dA, dB, None, None, None


def _gradients(
    ctx: Any, g: Tensor, x: Tensor, z: Tensor, weight: Tensor, A: Tensor, B: Tensor
) -> tuple[Tensor | None, ...]:
    slide, scale, drop = ctx.slide, ctx.scale, ctx.drop
    needs_x, needs_a, needs_b = (ctx.needs_input_grad[i] for i in (0, 3, 4))
    dx = dA = dB = None
    g = in_order(g, slide.groups)
    if needs_b:
        dB = sum_over_places(g, z, slide.groups).view(B.shape).to(B.dtype)
    if needs_x:
        dx = slide.back(g, x, weight, dx=True, dweight=False)[0]
    if not (needs_x or needs_a):
        return dx, dA, dB
    up = torch.unflatten(B.flatten(1).to(g.dtype), 0, (slide.groups, -1)).mT.flatten(0, 1)
    dz = through_channels(up, g, slide.groups)
    seen, a = _seen(x, drop) if needs_a else x, A.to(g.dtype) * scale
    if slide.is_pointwise(A.shape[2:]):
        dA = sum_over_places(dz, seen).view(A.shape) if needs_a else None
        if dx is not None and drop is None:
            dx = add_through_channels_(in_order(dx), a.flatten(1).t(), dz)
        through = through_channels(a.flatten(1).t(), dz) if dx is not None and drop is not None else None
    else:
        through, dA = slide.back(dz, seen, a, dx=needs_x, dweight=needs_a)
    if dx is not None and through is not None:
        dx = dx.add_(through if drop is None else through.mul_(_mask(drop, x)))
    return dx, None if dA is None else (dA * scale).to(A.dtype), dB


def _down(x: Tensor, A: Tensor, slide: Slide) -> Tensor:
    """`A * x`."""
    return through_channels(A.flatten(1), x) if slide.is_pointwise(A.shape[2:]) else slide.over(x, A)


def _seen(x: Tensor, drop: Dropout | None) -> Tensor:
    """What the adapter sees of x, before the scale of dropout."""
    return x if drop is None else unflat(kept(flat(x), drop.keep(flat(x))), x)


def _mask(drop: Dropout, x: Tensor) -> Tensor:
    """Ones where x stays, in its dtype."""
    return unflat(drop.keep(flat(x)), x).to(x.dtype)


def _plain(ctx: Any, weight: Tensor) -> Any:
    """The same by operations that can be differentiated again."""
    slide: Slide = ctx.slide
    scale, drop = ctx.scale, ctx.drop

    def plain(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        seen = x if drop is None else x * _mask(drop, x)
        z = slide.over(seen, A.to(x.dtype) * scale)
        ones = Slide((1,) * (x.dim() - 2), (0,) * (x.dim() - 2), (1,) * (x.dim() - 2), slide.groups)
        return slide.over(x, weight) + ones.over(z, B.to(x.dtype))

    return plain
