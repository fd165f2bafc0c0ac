"""`h = x W0^T + b + s (x A^T) B^T` as autograd functions: `functional.lora_update` in fewer passes over memory.

- Siblings (query, key and value; gate and up) that turn out to read the same tensor share it: the first to be called
  computes x A^T of all in one product, and in backward, after all the others, the gradients of all A's in one, and one
  dX into which each has added its own product.
- The update is added into the base's own output, with no temporary of the layer's width.
- Kept for backward: x, once however many read it, or what computes it anew (`replay.py`), and z = s x A^T. A and B are
  cast to x's dtype, never x to theirs.
- Dropout comes from random bytes (`drops.py`), drawn again in backward from a seed; siblings share its mask too.
- What needs no gradient gets none: no dX for an input without one, no dA for a frozen A.

The algorithm is that of unsloth's LoRA functions (github.com/unslothai/unsloth, kernels/fast_lora.py) but for what
siblings share, the dropout, and the order in memory of what is of rank's size.

Shapes: n rows, k inputs, m outputs, rank r; x is (..., k), W0 (m, k) or its transpose, A (r, k), B (m, r), z (r, n).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lightning.lora.drops import Dropout, add_kept_, drawn, kept
from lora_lightning.lora.products import Prepare, frozen_product
from lora_lightning.lora.reading import Down, Reading, thread
from lora_lightning.lora.replay import Replays, Source
from lora_lightning.lora.traced import is_ordinary, is_unwatched


class Frozen(NamedTuple):
    """The base layer: W0 as (m, k), or as (k, m) where `transposed`, and its bias."""

    weight: Tensor
    bias: Tensor | None
    transposed: bool = False
    prepare: Prepare = "auto"
    """What computes the products with W0, see `products.py`."""


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Within the block every layer computes by torch's own operations, for comparison."""
    before, thread.plain = thread.plain, True
    try:
        yield
    finally:
        thread.plain = before


def can_go_quick(x: Any, *tensors: Tensor | None) -> bool:
    """Whether this is a plain call: ordinary strided tensors, under none of torch's transforms or tracers."""
    return (
        not thread.plain
        and not torch.compiler.is_compiling()
        and is_ordinary(x)
        and x.layout is torch.strided
        and not (x.is_nested or x.is_meta)
        and x.dim() > 0
        and x.is_floating_point()
        and not (x.is_inference() and torch.is_grad_enabled())
        and all(t is None or is_ordinary(t.data) for t in tensors)
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and is_unwatched()  # selective checkpointing among others, which keeps what we change
    )


FEW_ROWS = 128
"""Below, on a CPU, functions of our own cost more than they save: over the frozen step, 16 rows of 384 take 1.56 and by
torch's operations 1.34, a forward of 1 row 1.74 and 1.24; from 128 rows on they are level (measured on an EPYC)."""


def has_few_rows(x: Any) -> bool:
    """Whether torch's own operations are as quick for this input as the functions here, or quicker."""
    return isinstance(x, Tensor) and x.device.type == "cpu" and x.dim() > 0 and x.numel() < FEW_ROWS * x.shape[-1]


def quick_linear(
    x: Tensor,
    frozen: Frozen,
    down: Down,
    B: Tensor,
    *,
    siblings: Callable[[], Sequence[Down]] = tuple,
    dropout: float = 0.0,
    replays: Replays | None = None,
) -> Tensor:
    """`x W0^T + b + s (x A^T) B^T`, (..., m), with dropout on the adapter's input. W0 and b get no gradient.

    Args:
        siblings: gives the layers that may be called with the same x next, with the same dropout.
        replays: computes x anew in backward where that is cheap, in place of keeping it.
    """
    device = x.device.type
    mixed = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if mixed else x.dtype
    opened, state = thread.open, _state(x, dtype, dropout)
    z = opened.joined(x, down, state)
    if z is not None:
        assert opened.reading is not None
        reading, x = opened.reading, x if opened.x is None else opened.x
        if not opened.zs:
            opened.close()
        return _Next.apply(x, z, *frozen, B, reading)  # type: ignore[no-any-return,no-untyped-call]
    opened.close()
    reading, cast = Reading(dtype, drawn(dropout), opened), x.to(dtype)
    if replays is not None and (again := replays.of(cast, down.layer)) is not None:
        reading.source = Source.of(cast, again)
    downs = [down, *(siblings() if state else ())]
    out, *zs = _First.apply(cast, *frozen, B, reading, [d.scale for d in downs], *(d.A for d in downs))  # type: ignore[no-untyped-call]
    if zs:
        opened.reading, opened.source, opened.state = reading, weakref.ref(x), state
        opened.x = None if cast is x else cast
        opened.zs = {d.layer: (d, d.A._version, z) for d, z in zip(downs[1:], zs, strict=True)}
    return out  # type: ignore[no-any-return]


def _state(x: Tensor, dtype: torch.dtype, dropout: float) -> tuple[Any, ...] | None:
    """What must be the same for a sibling that joins; None where it must not.

    Without a graph through x, x may be a buffer that is filled anew. Who is checkpointed does not join who is not:
    recomputed, it would be alone, and under dropout would draw another mask than it did.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    is_recomputed = hooks is not None or torch._C._current_graph_task_id() != -1
    if not torch.is_grad_enabled() or x.grad_fn is None or (dropout and is_recomputed):
        return None
    return x._version, dtype, dropout, hooks and hooks[0]


def _base(x: Tensor, frozen: Frozen, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the base layer gives, as it computes it, and W0 in the dtype of the products."""
    weight, bias = frozen.weight.to(dtype), None if frozen.bias is None else frozen.bias.to(dtype)
    out = frozen_product(x, weight.t() if frozen.transposed else weight, bias, prepare=frozen.prepare)
    if out is None and frozen.transposed:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
        out = out.view(*x.shape[:-1], weight.shape[1])
    elif out is None:
        out = F.linear(x, weight, bias).contiguous()
    # The same memory, but no view in torch's books: those may not be written into when a function returns them.
    return torch.empty(0, dtype=out.dtype, device=out.device).set_(out), weight  # type: ignore[call-overload]


def _add_up(out: Tensor, z: Tensor, B: Tensor) -> None:
    """Add z^T B^T to the base's output, in place."""
    out.view(-1, out.shape[-1]).addmm_(z.t(), B.to(z.dtype).t())


class _First(torch.autograd.Function):
    """The first layer to read x: its output, and z of every sibling, whose gradients it finishes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        prepare: Prepare,
        B: Tensor,
        reading: Reading,
        scales: list[float],
        *As: Tensor,
    ) -> tuple[Tensor, ...]:
        """The output (..., m) and the siblings' z."""
        out, cast = _base(x, Frozen(weight, bias, transposed, prepare), reading.dtype)
        rows = x.reshape(-1, x.shape[-1])
        if reading.drop is not None:
            rows = kept(rows, reading.drop.keep(rows))
        ctx.scales = scales if reading.drop is None else [s * reading.drop.scale for s in scales]
        zs = torch.split(_down(_scaled(As, ctx.scales, reading.dtype), rows), [A.shape[0] for A in As])
        _add_up(out, zs[0], B)
        ctx.save_for_backward(x if reading.source is None else None, zs[0], cast, B, *As)
        ctx.transposed, ctx.prepare, ctx.reading, ctx.As = transposed, prepare, reading, As
        ctx.versions, ctx.device = [A._version for A in As[1:]], x.device.type
        ctx.set_materialize_grads(False)
        return out, *zs[1:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Runs after every sibling that took its z."""
        reading, needs_a, g, dzs = ctx.reading, ctx.needs_input_grad[8:], grads[0], list(grads)
        needs_x, needs_b = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        if reading.opened.reading is reading:
            reading.opened.close()
        now = reading.now()
        if all(grad is None for grad in grads):
            return (None,) * (8 + len(ctx.As))
        # Without a sibling in this pass, z's gradient is a second derivative, whose graph holds what was saved here.
        is_whole = g is not None or (now.x is None and reading.source is None)
        if not is_whole and ctx.versions != [A._version for A in ctx.As[1:]]:
            raise RuntimeError("lora_A has been modified by an inplace operation since the forward pass that read it")
        x, z, weight, B, *As = ctx.saved_tensors if is_whole else (now.x, None, None, None, *ctx.As)
        dB: Tensor | None = None
        dx: Tensor | None
        with torch.autocast(ctx.device, enabled=False):
            if reading.source is not None:
                x = reading.source.x()
            if torch.is_grad_enabled():
                dx, dB, dAs = _differentiable(ctx, x, weight, B, As, grads)
                return dx, None, None, None, None, dB, None, None, *dAs
            if g is not None:
                g = g.contiguous().view(-1, g.shape[-1])
                dB = torch.mm(z, g).t().to(B.dtype) if needs_b else None
                dzs[0] = _down(B.to(g.dtype).t(), g) if needs_x or needs_a[0] else None
                if needs_x:
                    now.add(g, weight.t() if ctx.transposed else weight, ctx.prepare)
            dx, dAs = _finish(now.dx, reading.drop, x, dzs, As, ctx.scales, needs_x, needs_a)
            now.dx = now.x = None
        return dx, None, None, None, None, dB, None, None, *dAs


class _Next(torch.autograd.Function):
    """A sibling that joined: its z comes from the first, and so do the gradients below z."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        prepare: Prepare,
        B: Tensor,
        reading: Reading,
    ) -> Tensor:
        """(..., m)."""
        out, cast = _base(x, Frozen(weight, bias, transposed, prepare), reading.dtype)
        _add_up(out, z, B)
        ctx.save_for_backward(x if reading.source is None else None, z, cast, B)
        ctx.transposed, ctx.prepare, ctx.reading = transposed, prepare, reading
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """dX goes into the reading, but where the gradient itself is to be differentiated."""
        (x, z, weight, B), now = ctx.saved_tensors, ctx.reading.now()
        now.x, weight = x, weight.t() if ctx.transposed else weight
        needs_x, needs_z, needs_b = (ctx.needs_input_grad[i] for i in (0, 1, 6))
        g = grads[0].contiguous().view(-1, grads[0].shape[-1])
        dx = None
        with torch.autocast(g.device.type, enabled=False):
            dz = _down(B.to(g.dtype).t(), g) if needs_z else None
            dB = torch.mm(z, g).t().to(B.dtype) if needs_b else None
            if torch.is_grad_enabled():
                dx = torch.mm(g, weight).view(*grads[0].shape[:-1], weight.shape[1])
            elif needs_x:
                now.add(g, weight, ctx.prepare)
        return dx, dz, None, None, None, None, dB, None


def _down(A: Tensor, rows: Tensor) -> Tensor:
    """`A rows^T` as (r, n), in the order in memory in which the thin products around it are quick."""
    return torch.mm(A, rows.t()) if _LONG_ROWS else torch.mm(rows, A.t()).t()


def _stacked(zs: list[Tensor]) -> Tensor:
    """Several (r, n), one below the other."""
    if len(zs) == 1:
        return zs[0]
    return torch.cat(zs) if _LONG_ROWS else torch.cat([z.t() for z in zs], dim=1).t()


def _has_amd_cpu() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text(errors="replace")


_LONG_ROWS = _has_amd_cpu()
"""Whether rank-sized results lie as (r, n) in memory rather than as (n, r): on AMD EPYC the algorithm gains nothing
without it, on an Intel Xeon with AMX it costs a tenth of the overhead in float32 and a third in bfloat16."""


def _scaled(As: Sequence[Tensor], scales: list[float], dtype: torch.dtype) -> Tensor:
    """Every s A, one below the other, in `dtype`."""
    return torch.cat([A.to(dtype) * s for A, s in zip(As, scales, strict=True)])


def _finish(
    dx: Tensor | None,
    drop: Dropout | None,
    x: Tensor,
    dzs: list[Tensor | None],
    As: list[Tensor],
    scales: list[float],
    needs_x: bool,
    needs_a: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dX and every dA, from the gradients of the z's; a sibling that took no part has None."""
    there = [i for i, dz in enumerate(dzs) if dz is not None]
    dAs: list[Tensor | None] = [None] * len(As)
    if not there:
        return (None if dx is None else dx.view(x.shape)), dAs
    dz = _stacked([d for d in dzs if d is not None])
    rows = x.reshape(-1, x.shape[-1])
    keep = None if drop is None else drop.keep(rows)
    if any(needs_a[i] for i in there):
        whole = torch.mm(dz, rows if keep is None else kept(rows, keep))
        for i, part in zip(there, torch.split(whole, [As[i].shape[0] for i in there]), strict=True):
            dAs[i] = (part * scales[i]).to(As[i].dtype) if needs_a[i] else None
    if not needs_x:
        return None, dAs
    A = _scaled([As[i] for i in there], [scales[i] for i in there], dz.dtype)
    dx = dx if dx is not None else torch.zeros_like(rows)
    dx = dx.addmm_(dz.t(), A) if keep is None else add_kept_(dx, dz, A, keep)
    return dx.view(x.shape), dAs


def _differentiable(
    ctx: Any, x: Tensor, weight: Any, B: Any, As: list[Tensor], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """The same by operations that can be differentiated again, for `create_graph=True`."""
    dtype, drop, rows = ctx.reading.dtype, ctx.reading.drop, x.reshape(-1, x.shape[-1])
    seen, dzs, dB = rows if drop is None else rows * drop.keep(rows).to(dtype), list(grads), None
    dx, through = torch.zeros_like(rows), torch.zeros_like(rows)
    if (g := grads[0]) is not None:
        g = g.reshape(-1, g.shape[-1])
        dzs[0] = B.to(dtype).t() @ g.t()
        dB = (g.t() @ (seen @ As[0].to(dtype).t() * ctx.scales[0])).to(B.dtype)
        dx = dx + g @ (weight.t() if ctx.transposed else weight)
    dAs: list[Tensor | None] = []
    for dz, A, scale in zip(dzs, As, ctx.scales, strict=True):
        dAs.append(None if dz is None else (dz @ seen * scale).to(A.dtype))
        through = through if dz is None else through + dz.t() @ (A.to(dtype) * scale)
    dx = dx + (through if drop is None else through * drop.keep(rows).to(dtype))
    return dx.view(x.shape), dB, dAs
