"""`h = x W0^T + b + s (x A^T) B^T` as one autograd function: `functional.lora_update` in fewer passes over memory.

- The update is added in place to the base's output, and its part of dX to the base's, without a tensor of that width.
- Backward saves the uncast x, and z = s x A^T. A and B are cast to the dtype of the product, never x to theirs; under
  autocast x is cast inside, so that layers with one input save one x.
- z and its gradient have the memory order in which the thin products around them are fast: column-major in float32 and
  float64, row-major in half precision.
- Dropout uses one random byte per element, so p is rounded to a multiple of 1/256. Only a seed is saved: backward
  generates the mask again.
- With many rows, `W' = W0 + s B A` is folded first, in float32 or float64, and one product with it replaces three.
- On a CPU, some rows are taken at a time, so that x and the gradient of the output are read from memory once.

With B = 0 the output equals the backbone's, bit for bit. Everything for which `can_fuse` is false is computed in eager
form.

Shapes: n rows, k inputs, m outputs, rank r; x (..., k), W0 (m, k), A (r, k), B (m, r), z (n, r).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
    """Whether p is 0, or rounds to a multiple of 1/256 between 0 and 1."""
    return p == 0 or 0 < round(256 * p) < 256


def fused_linear(
    x: Tensor, W0: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, *, dropout: float = 0.0
) -> Tensor:
    """`x W0^T + b + s (x A^T) B^T` of x (..., k), with dropout on the adapter's input. W0 gets no gradient.

    Args:
        dropout: a probability for which `drops_by_bytes` is true; the seed comes from torch's default generator.
    """
    out: Tensor = FusedLinear.apply(x, W0, bias, A, B, scale, round(256 * dropout))  # type: ignore[no-untyped-call]
    return out


class FusedLinear(torch.autograd.Function):
    """See `fused_linear`; `dropped` of a byte's 256 values drop an element."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W0: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropped: int
    ) -> Tensor:
        ctx.dtype, ctx.dropped, ctx.scale = _product_dtype(x), dropped, scale * 256 / (256 - dropped)
        ctx.seed = int(torch.randint(2**62, (), dtype=torch.int64)) if dropped else 0
        ctx.folds = not dropped and _pays_to_fold(x, W0, A, B)
        cast, b, z = x.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype), None
        # The product takes x in its own shape, by which torch chooses how it rounds. Its data are no view, which an
        # autograd function may not return where the output is written into.
        out = F.linear(cast, _folded(W0, A, B, scale) if ctx.folds else W0.to(ctx.dtype), b).data
        if not ctx.folds:
            rows, a = cast.reshape(-1, x.shape[-1]), A.to(ctx.dtype) * ctx.scale
            z = _dropped_product(rows, a, dropped, ctx.seed) if dropped else _thin_product(rows, a)
            out.view(-1, len(W0)).addmm_(z, B.to(ctx.dtype).t())
        ctx.save_for_backward(x, W0, A, B, z)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """By operations that can themselves be differentiated, for `create_graph=True`."""
        x, W0, A, B, z = ctx.saved_tensors
        g = grads[0].reshape(-1, len(W0))
        needs_x, _, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        dX: Tensor | None = None
        with torch.autocast(x.device.type, enabled=False):
            rows, a, b = x.to(ctx.dtype).reshape(-1, x.shape[-1]), A.to(ctx.dtype) * ctx.scale, B.to(ctx.dtype)
            if needs_x:
                dX = torch.mm(g, _folded(W0, A, B, ctx.scale) if ctx.folds else W0.to(ctx.dtype))
            if torch.is_grad_enabled():
                z = None  # which has no graph of its own
            wide = torch.promote_types(ctx.dtype, torch.float32)
            dA = a.new_zeros(a.shape, dtype=wide) if needs_A else None
            dB = b.new_zeros(b.shape[::-1], dtype=wide) if needs_B else None  # transposed
            for part, mask in _blocks(rows, ctx.dropped, ctx.seed):
                dz = _thin_product(g[part], b.t())
                if dX is not None and not ctx.folds:
                    _add_product_(dX[part], dz, a, mask)
                seen = rows[part] if mask is None else mask * rows[part]
                if dA is not None:
                    _add_product_(dA, dz.t(), seen)
                if dB is not None:
                    _add_product_(dB, (_thin_product(seen, a) if z is None else z[part]).t(), g[part])
            return (
                None if dX is None else dX.to(x.dtype).view(x.shape),
                None,
                g.sum(0) if needs_bias else None,
                None if dA is None else (dA * ctx.scale).to(A.dtype),
                None if dB is None else dB.t().to(B.dtype),
                None,
                None,
            )


def _is_autocast(x: Tensor) -> bool:
    """Whether autocast chooses the dtype of a product with x; it leaves float64 as it is."""
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the product: x's, or autocast's."""
    return torch.get_autocast_dtype(x.device.type) if _is_autocast(x) else x.dtype


def _pays_to_fold(x: Tensor, W0: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether two thin products with n rows cost more than folding, which is exact enough in wide dtypes only."""
    m, k = W0.shape
    is_wide = W0.dtype.itemsize >= 4 and {_product_dtype(x), x.dtype, A.dtype, B.dtype} == {W0.dtype}
    return is_wide and x.numel() // k * (m + k) >= 3 * m * k


def _folded(W0: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`W0 + s B A`, in W0's memory order, in which a product with it gives the same bits where B is zero."""
    return W0.clone().addmm_(B, A, alpha=scale)


def _blocks(x: Tensor, dropped: int, seed: int) -> Iterator[tuple[slice, Tensor | None]]:
    """Some rows of x at a time, with dropout's mask for them: 1 where an element stays, else 0, in x's dtype.

    Without dropout there are no masks. On a GPU, and without dropout in half precision, whose products on a CPU are
    quicker whole, one block covers all rows.
    """
    n, k = x.shape
    is_whole = x.device.type != "cpu" or (not dropped and x.dtype.itemsize == 2)
    count = max(1, n if is_whole else min(n, BLOCK // max(1, k)))
    generator = torch.Generator(x.device).manual_seed(seed) if dropped else None
    for start in range(0, n, count):
        part, mask = x[start : start + count], None
        if dropped:
            words = torch.empty(-(-part.numel() // 8), dtype=torch.int64, device=x.device)
            random = words.random_(-(2**63), None, generator=generator).view(torch.uint8)[: part.numel()]
            mask = torch.ge(random.view(part.shape), dropped, out=torch.empty_like(part))
        yield slice(start, start + len(part)), mask


def _thin_product(x: Tensor, a: Tensor) -> Tensor:
    """`x a^T` (n, r), in the memory order of z."""
    return torch.mm(x, a.t()) if a.dtype.itemsize == 2 else torch.mm(a, x.t()).t()


def _dropped_product(x: Tensor, a: Tensor, dropped: int, seed: int) -> Tensor:
    """`(mask x) a^T` (n, r)."""
    z = a.new_empty(len(a), len(x)).t()
    for part, mask in _blocks(x, dropped, seed):
        assert mask is not None
        z[part] = _thin_product(mask.mul_(x[part]), a)
    return z


def _add_product_(out: Tensor, left: Tensor, right: Tensor, mask: Tensor | None = None) -> None:
    """Add `left right`, or `mask (left right)`, to `out`, which may be wider."""
    if mask is not None:
        out.addcmul_(torch.mm(left, right), mask)
    elif out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out += torch.mm(left, right)
