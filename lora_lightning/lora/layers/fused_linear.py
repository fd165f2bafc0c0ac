"""`h = x W0^T + b + s (x A^T) B^T` as one autograd function: `functional.lora_update` in fewer passes over memory.

- The update is added in place to the base's output, and its part of dX to the base's, without a tensor of that width.
- Backward saves the uncast x, and z = s x A^T. A and B are cast to the dtype of the product, never x to theirs; under
  autocast x is cast inside, so that layers with one input save one x.
- z and its gradient have the memory order in which the thin products around them are fast: column-major in float32 and
  float64, row-major in half precision.
- Dropout uses one random byte per element, so p is rounded to a multiple of 1/256 and the scale is corrected for it.
  Only a seed is saved: backward generates the mask again, some rows at a time.
- With many rows, `W' = W0 + s B A` is folded first, in float32 or float64, and one product with it replaces three; so
  also in backward for dX.
- On a CPU, backward takes the four rank-sized products of some rows together, so that x and the gradient of the output
  are read from memory once.

With B = 0 the output equals the backbone's, bit for bit. Second derivatives are computed in eager form, as is
everything for which `can_fuse` is false.

Shapes: n rows, k inputs, m outputs, rank r; x (..., k), W0 (m, k) or its transpose, A (r, k), B (m, r), z (n, r).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lightning.lora.layers.functional import lora_update
from lora_lightning.lora.layers.tracing import is_ordinary, is_traced

BLOCK = 2**18
"""Elements of x that dropout, or backward in a wide dtype, processes at once on a CPU, so that its cache holds them."""

FEW_ROWS = 128
"""With fewer rows, on a CPU, the function costs more than it saves: three layers of width 384 with 16 rows take 2.5
times the frozen step, eager 1.8; of width 768 with 2048 rows 1.24, eager 1.38 (one Xeon core)."""

_eager = ContextVar("eager", default=False)


@contextmanager
def eager_arithmetic() -> Iterator[None]:
    """Within the block every layer computes in eager form, for comparison."""
    before = _eager.set(True)
    try:
        yield
    finally:
        _eager.reset(before)


def can_fuse(x: Any, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether the fused form can replace the eager one: ordinary tensors, enough rows, and no active transform."""
    return (
        not (torch.compiler.is_compiling() or _eager.get())
        # torch has no public names for these: vmap and jvp, for which this function has no rules, and dispatch modes,
        # such as selective checkpointing, which would save a tensor that is written into afterwards.
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and (is_traced() or not torch._C._len_torch_dispatch_stack())
        and all(is_ordinary(t) for t in (x, weight, *others) if t is not None)
        and x.dim() > 0
        and (x.device.type != "cpu" or x.numel() >= FEW_ROWS * x.shape[-1])
        and x.layout is torch.strided
        and not (x.is_nested or x.is_meta)
        and (x.dtype == weight.dtype or (_is_autocast(x) and weight.dtype != torch.float64))
        and not (x.is_inference() and torch.is_grad_enabled())
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    )


def drops_by_bytes(p: float) -> bool:
    """Whether p, rounded to a multiple of 1/256, is neither 0 nor 1, or is exactly 0."""
    return p == 0 or 0 < round(256 * p) < 256


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    *,
    transposed: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """`x W0^T + b + s (x A^T) B^T`, (..., m), with dropout on the adapter's input. W0 gets no gradient.

    Args:
        transposed: `weight` is (k, m), as in transformers' Conv1D.
        dropout: a probability for which `drops_by_bytes` is true; the seed comes from torch's default generator.
    """
    out: Tensor = FusedLinear.apply(x, weight, bias, A, B, scale, transposed, round(256 * dropout))  # type: ignore[no-untyped-call]
    return out


class FusedLinear(torch.autograd.Function):
    """See `fused_linear`; `dropped` of a byte's 256 values drop an element."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        transposed: bool,
        dropped: int,
    ) -> Tensor:
        dtype = _product_dtype(x)
        ctx.dtype, ctx.transposed, ctx.dropped = dtype, transposed, dropped
        ctx.seed = int(torch.randint(2**62, (), dtype=torch.int64)) if dropped else 0
        ctx.scale = scale * 256 / (256 - dropped)
        cast, W0, b = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        rows, z = cast.reshape(-1, x.shape[-1]), None
        ctx.folds = not dropped and _pays_to_fold(len(rows), weight, x, A, B)
        if ctx.folds:
            out = _base_output(cast, _folded(W0, A, B, scale, transposed), b, transposed)
        else:
            out, a = _base_output(cast, W0, b, transposed), A.to(dtype) * ctx.scale
            z = _dropped_product(rows, a, dropped, ctx.seed) if dropped else _thin_product(rows, a)
            out.view(-1, out.shape[-1]).addmm_(z, B.to(dtype).t())
        ctx.save_for_backward(x, weight, A, B, z)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, z = ctx.saved_tensors
        needs_x, _, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        g = grads[0].reshape(-1, grads[0].shape[-1])
        dX: Tensor | None = None
        dA: Tensor | None = None
        dB: Tensor | None = None
        with torch.autocast(x.device.type, enabled=False):
            dbias = g.sum(0) if needs_bias else None
            if torch.is_grad_enabled():
                dX, dA, dB = _differentiable_gradients(ctx, x, weight, A, B, grads[0])
                return dX, None, dbias, dA, dB, None, None, None
            rows, a, b = x.to(ctx.dtype).reshape(-1, x.shape[-1]), A.to(ctx.dtype) * ctx.scale, B.to(ctx.dtype)
            if needs_x:
                W = _folded(weight, A, B, ctx.scale, ctx.transposed) if ctx.folds else weight.to(ctx.dtype)
                dX = torch.mm(g, W.t() if ctx.transposed else W)
            wide = torch.promote_types(ctx.dtype, torch.float32)
            dA = a.new_zeros(a.shape, dtype=wide) if needs_A else None
            dB = b.new_zeros(b.shape[::-1], dtype=wide) if needs_B else None  # transposed
            for part, mask in _blocks(rows, ctx.dropped, ctx.seed):
                dz = _thin_product(g[part], b.t())
                if dX is not None and not ctx.folds:
                    _add_product_(dX[part], dz, a, mask)
                seen = _masked_(mask, rows[part])
                if dA is not None:
                    _add_product_(dA, dz.t(), seen)
                if dB is not None:
                    _add_product_(dB, (_thin_product(seen, a) if z is None else z[part]).t(), g[part])
            dA = None if dA is None else (dA * ctx.scale).to(A.dtype)
            dB = None if dB is None else dB.t().to(B.dtype)
        return None if dX is None else dX.view(x.shape).to(x.dtype), None, dbias, dA, dB, None, None, None


def _is_autocast(x: Tensor) -> bool:
    """Whether autocast chooses the dtype of a product with x; it leaves float64 as it is."""
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the product: x's, or autocast's."""
    return torch.get_autocast_dtype(x.device.type) if _is_autocast(x) else x.dtype


def _pays_to_fold(n: int, weight: Tensor, *others: Tensor) -> bool:
    """Whether two thin products with n rows cost more than folding, which is exact enough in wide dtypes only."""
    m, k = weight.shape
    wide = weight.dtype in (torch.float32, torch.float64) and all(t.dtype == weight.dtype for t in others)
    return wide and n * (m + k) >= 3 * m * k and weight.is_contiguous() and _product_dtype(others[0]) == weight.dtype


def _folded(weight: Tensor, A: Tensor, B: Tensor, scale: float, transposed: bool) -> Tensor:
    """`W0 + s B A`, in W0's orientation."""
    left, right = (A.t(), B.t()) if transposed else (B, A)
    return torch.addmm(weight, left, right, alpha=scale)


def _base_output(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """The base layer's output, by the base layer's operations."""
    if transposed:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
        out = out.view(*x.shape[:-1], weight.shape[1])
    else:
        out = F.linear(x, weight, bias).contiguous()
    # The same memory, but not marked as a view: a view that an autograd function returns may not be written into.
    plain: Tensor = torch.empty(0, dtype=out.dtype, device=out.device).set_(out)  # type: ignore[call-overload]
    return plain


def _blocks(rows: Tensor, dropped: int, seed: int) -> Iterator[tuple[slice, Tensor | None]]:
    """Some rows of x (n, k) at a time, with dropout's mask for them: 1 where an element stays, else 0, in x's dtype.

    All masks share one buffer. Without dropout there are none. On a GPU, and without dropout in half precision, whose
    products on a CPU are quicker whole, one block covers all rows.
    """
    n, k = rows.shape
    is_whole = rows.device.type != "cpu" or (not dropped and rows.dtype.itemsize == 2)
    count = max(1, n if is_whole else min(n, BLOCK // max(1, k)))
    if dropped:
        generator = torch.Generator(rows.device).manual_seed(seed)
        words = torch.empty(-(-count * k // 8), dtype=torch.int64, device=rows.device)
        buffer = torch.empty(count, k, dtype=rows.dtype, device=rows.device)
    for start in range(0, n, count):
        size, mask = min(count, n - start), None
        if dropped:
            random = words.random_(-(2**63), None, generator=generator).view(torch.uint8)[: size * k]
            mask = torch.ge(random.view(size, k), dropped, out=buffer[:size])
        yield slice(start, start + size), mask


def _thin_product(rows: Tensor, a: Tensor) -> Tensor:
    """`rows a^T` (n, r), in the memory order of z."""
    return torch.mm(rows, a.t()) if a.dtype.itemsize == 2 else torch.mm(a, rows.t()).t()


def _dropped_product(rows: Tensor, a: Tensor, dropped: int, seed: int) -> Tensor:
    """`(mask x) a^T` (n, r)."""
    z = a.new_empty(len(a), len(rows)).t()
    for part, mask in _blocks(rows, dropped, seed):
        z[part] = _thin_product(_masked_(mask, rows[part]), a)
    return z


def _masked_(mask: Tensor | None, x: Tensor) -> Tensor:
    """`mask x`, in the mask's memory."""
    return x if mask is None else mask.mul_(x)


def _add_product_(out: Tensor, left: Tensor, right: Tensor, mask: Tensor | None = None) -> None:
    """Add `left right`, or `mask (left right)`, to `out`, which may be wider."""
    if mask is not None:
        out.addcmul_(torch.mm(left, right), mask)
    elif out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out += torch.mm(left, right)


def _differentiable_gradients(
    ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, g: Tensor
) -> list[Tensor | None]:
    """The gradients of x, A and B by operations that can be differentiated again, for `create_graph=True`."""
    with torch.enable_grad():
        # Views, so that gradients do not flow from one input into another that it was computed from.
        x_, A_, B_ = inputs = [t.view_as(t) for t in (x, A, B)]
        seen = cast = x_.to(ctx.dtype)
        if ctx.dropped:
            rows = cast.detach().reshape(-1, x.shape[-1])
            masks = [mask.clone() for _, mask in _blocks(rows, ctx.dropped, ctx.seed) if mask is not None]
            seen = cast * torch.cat([rows[:0], *masks]).view(x.shape)
        W0 = weight.to(ctx.dtype)
        out = F.linear(cast, W0.t() if ctx.transposed else W0) + lora_update(seen, A_, B_, ctx.scale)
        wanted = [t for t in inputs if t.requires_grad]
        gradients = iter(torch.autograd.grad(out, wanted, g, create_graph=True) if wanted else ())
    return [next(gradients) if t.requires_grad else None for t in inputs]
