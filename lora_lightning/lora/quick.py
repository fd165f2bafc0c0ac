"""`h = x W0^T + b + s (x A^T) B^T` as autograd functions: `functional.lora_update` in fewer passes over memory.

- Layers that read the same tensor (query, key and value; gate and up) are found as they run: the first opens a
  `Reading` of it, the others join. They share the input's cast, one dropout mask, and one buffer for dX, into which
  each adds its own product; the first finishes it in backward, after all the others.
- The update is added into the base's own output, with no temporary of the layer's width.
- Kept for backward: x, once however many read it, and z = s x A^T. A and B are cast to x's dtype, never x to theirs.
- Dropout comes from random bytes, drawn again in backward from a seed: eight bits an element, so that p is rounded to
  a multiple of 1/256 and the scale corrected to it exactly.
- What needs no gradient gets none: no dX for an input without one, no dA for a frozen A.

Rank-sized results lie as (r, n), in which thin products are quick on every CPU that was measured. The algorithm is
that of unsloth's LoRA functions (github.com/unslothai/unsloth, kernels/fast_lora.py) but for the common buffer, the
layout and the dropout.

Shapes: n rows, k inputs, m outputs, rank r; x is (..., k), W0 (m, k) or its transpose, A (r, k), B (m, r).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Frozen(NamedTuple):
    """The base layer: W0 as (m, k), or as (k, m) where `transposed`, and its bias."""

    weight: Tensor
    bias: Tensor | None
    transposed: bool = False


@dataclass(frozen=True)
class Dropout:
    """A mask that is not kept, only the seed that draws it again."""

    dropped: int
    """How many of a random byte's 256 values drop an element."""
    seed: int

    @property
    def scale(self) -> float:
        """What keeps the expectation."""
        return 256 / (256 - self.dropped)

    def keep(self, x: Tensor) -> Tensor:
        """Which elements of x (n, k) stay: booleans of its shape."""
        generator = torch.Generator(x.device).manual_seed(self.seed)
        kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        for rows in _blocks(kept):
            words = torch.empty(-(-rows.numel() // 8), dtype=torch.int64, device=x.device)
            random = words.random_(-(2**63), None, generator=generator).view(torch.uint8)[: rows.numel()]
            torch.ge(random.view(rows.shape), self.dropped, out=rows)
        return kept


BLOCK = 2**17
"""Elements that are worked on at once on a CPU, so that they stay in its cache."""


def _blocks(x: Tensor, *others: Tensor) -> Iterator[Any]:
    """The same rows of each tensor (n, k), some at a time; all at once on a GPU."""
    rows = max(1, x.shape[0] if x.device.type != "cpu" else BLOCK // max(1, x.shape[1]))
    parts = [torch.split(t, rows) for t in (x, *others)]
    return iter(parts[0]) if not others else zip(*parts, strict=True)


def masked(x: Tensor, keep: Tensor) -> Tensor:
    """x (n, k) with zeros where `keep` is False."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for to, rows, kept in _blocks(out, x, keep):
        torch.mul(rows, kept.to(x.dtype), out=to)  # many times quicker than `where` on a CPU
    return out


def add_masked_(dx: Tensor, dz: Tensor, A: Tensor, keep: Tensor) -> Tensor:
    """Add dz^T A to dx (n, k) where `keep` is True."""
    for to, rows, kept in _blocks(dx, dz.t(), keep):
        to.addcmul_(torch.mm(rows, A), kept.to(dx.dtype))
    return dx


@dataclass
class Reading:
    """What the layers that read one tensor have in common: the dtype of their products, the dropout, and dX."""

    dtype: torch.dtype
    drop: Dropout | None
    dx: Tensor | None = None
    """(n, k): the sum of g W0 over the layers whose backward has run."""
    updates: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(dz, A) of those layers; their products are added to `dx` together."""
    backward: int = -1
    """The backward pass that `dx`, `updates` and `seen` belong to."""
    seen: tuple[Tensor, Tensor] | None = None
    """Under dropout, what A sees of the input and which elements that keeps, from the first layer to the last."""

    def scaled(self, scale: float) -> float:
        """s, with what dropout needs to keep the expectation."""
        return scale if self.drop is None else scale * self.drop.scale

    def begin(self) -> None:
        """Forget what another backward pass left, which ended before it came to the first layer."""
        backward = torch._C._current_graph_task_id()
        if self.backward != backward:
            self.dx, self.updates, self.seen, self.backward = None, [], None, backward

    def see(self, rows: Tensor) -> Tensor:
        """What A sees of x (n, k)."""
        if self.drop is None:
            return rows
        if self.seen is None:
            keep = self.drop.keep(rows)
            self.seen = masked(rows, keep), keep
        return self.seen[0]

    def add(self, g: Tensor, weight: Tensor, dz: Tensor, A: Tensor) -> None:
        """One layer's share of dX: g (n, m) times W0 (m, k) at once, dz^T A by and by."""
        self.dx = torch.mm(g, weight) if self.dx is None else self.dx.addmm_(g, weight)
        self.updates.append((dz, A))

    def finish(self) -> Tensor | None:
        """dX, now that every layer has added its share."""
        self.begin()
        dx, updates = self.dx, self.updates
        if dx is None:
            return None
        dz, A = updates[0] if len(updates) == 1 else map(torch.cat, zip(*updates, strict=True))
        if self.drop is None:
            dx.addmm_(dz.t(), A)
        else:
            add_masked_(dx, dz, A, self.drop.keep(dx) if self.seen is None else self.seen[1])
        self.dx, self.updates, self.seen = None, [], None
        return dx


class _Open(threading.local):
    """The reading that others may join; layers that share an input are called one after the other.

    Kept apart from `Reading`, which the graph holds: `token` and `x` hold the graph.
    """

    reading: Reading | None = None
    source: weakref.ref[Tensor] | None = None
    """The tensor that the layers were called with."""
    version = -1
    x: Tensor | None = None
    """`source`, cast where autocast says so."""
    seen: Tensor | None = None
    """Under dropout, `x` as (n, k) without the dropped elements."""
    token: Tensor | None = None
    """An output of the first layer's node. Who takes it as an input has its backward run before the first's."""
    layers: frozenset[int] = frozenset()

    def close(self) -> None:
        """Let go of the graph."""
        self.reading = self.source = self.x = self.seen = self.token = None

    def joined(self, x: Tensor, layer: int, dtype: torch.dtype, dropped: int) -> bool:
        """Whether this layer reads the same as those before it, and for the first time."""
        reading = self.reading
        if (  # also without gradients: a checkpoint's first forward must draw as its second does
            reading is None
            or self.source is None
            or self.source() is not x
            or x.is_inference()  # which does not count its changes
            or self.version != x._version
            or reading.dtype != dtype
            or (reading.drop.dropped if reading.drop else 0) != dropped
            or layer in self.layers
        ):
            return False
        return (self.token is not None) == (x.requires_grad and torch.is_grad_enabled())


_open = _Open()
_switch = threading.local()


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Within the block every layer computes by torch's own operations, for comparison."""
    before = getattr(_switch, "off", False)
    _switch.off = True
    try:
        yield
    finally:
        _switch.off = before


def can_go_quick(x: Any, *tensors: Tensor | None) -> bool:
    """Whether this is a plain call: ordinary strided tensors, under none of torch's transforms or tracers."""
    return (
        not getattr(_switch, "off", False)
        and not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.layout is torch.strided
        and x.dim() > 0
        and x.is_floating_point()
        and not (x.is_inference() and torch.is_grad_enabled())
        and all(t is None or type(t.data) is Tensor for t in tensors)
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


def quick_linear(
    x: Tensor, frozen: Frozen, A: Tensor, B: Tensor, scale: float, *, layer: int = 0, dropout: float = 0.0
) -> Tensor:
    """`x W0^T + b + s (x A^T) B^T`, (..., m), with dropout on the adapter's input. W0 and b get no gradient.

    Args:
        layer: tells this layer from others that read the same x, such as its `id`.
    """
    device, dropped = x.device.type, dropped_of_256(dropout)
    mixed = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if mixed else x.dtype
    if _open.joined(x, layer, dtype, dropped):
        assert _open.reading is not None
        reading, x = _open.reading, x if _open.x is None else _open.x
        _open.layers |= {layer}
    else:
        reading, cast = _new_reading(dtype, dropped), x.to(dtype)
        _open.reading, _open.source = reading, weakref.ref(x)
        _open.version = -1 if x.is_inference() else x._version
        _open.x, _open.token, _open.layers = None if cast is x else cast, None, frozenset((layer,))
        _open.seen = None
        x = cast
    scale = reading.scaled(scale)
    if not torch.is_grad_enabled() or not (x.requires_grad or A.requires_grad or B.requires_grad):
        return _product(x, frozen, A, B, scale, reading)[0]
    if not x.requires_grad or _open.token is not None:
        return _Next.apply(x, _open.token, *frozen, A, B, scale, reading)  # type: ignore[no-any-return,no-untyped-call]
    out, _open.token = _First.apply(x, *frozen, A, B, scale, reading)  # type: ignore[no-untyped-call]
    return out  # type: ignore[no-any-return]


def dropped_of_256(p: float) -> int:
    """How many of a byte's 256 values drop an element, for a probability of p."""
    return round(256 * p)


def _new_reading(dtype: torch.dtype, dropped: int) -> Reading:
    """With a seed from torch's own generator, which `torch.manual_seed` sets and checkpointing puts back."""
    if not dropped:
        return Reading(dtype, None)
    return Reading(dtype, Dropout(dropped, int(torch.randint(2**62, (), dtype=torch.int64))))


def _product(
    x: Tensor, frozen: Frozen, A: Tensor, B: Tensor, scale: float, reading: Reading
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, z = s x A^T as (r, n), and W0 in the dtype of the products."""
    dtype, rows = reading.dtype, x.reshape(-1, x.shape[-1])
    weight, bias = frozen.weight.to(dtype), None if frozen.bias is None else frozen.bias.to(dtype)
    if not frozen.transposed:
        out = F.linear(x, weight, bias)
    else:
        out = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
        out = out.view(*x.shape[:-1], weight.shape[1])
    out = out if out.is_contiguous() else out.contiguous()
    z = torch.mm(A.to(dtype), _seen(rows, reading).t()).mul_(scale)
    out.view(-1, out.shape[-1]).addmm_(z.t(), B.to(dtype).t())
    return out, z, weight


def _seen(rows: Tensor, reading: Reading) -> Tensor:
    """What A sees of x (n, k) in forward; under dropout, made by the first layer for all."""
    if reading.drop is None:
        return rows
    if _open.reading is not reading or _open.seen is None:
        _open.seen = masked(rows, reading.drop.keep(rows))
    return _open.seen


class _Next(torch.autograd.Function):
    """A layer whose dX, if any, another's node finishes: one that joined a reading, or whose x needs no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        token: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        A: Tensor,
        B: Tensor,
        scale: float,
        reading: Reading,
    ) -> Tensor:
        """(..., m)."""
        out, z, cast = _product(x, Frozen(weight, bias, transposed), A, B, scale, reading)
        ctx.save_for_backward(x, z, cast, A, B)
        ctx.transposed, ctx.scale, ctx.reading, ctx.shape = transposed, scale, reading, x.shape
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """dX goes into the reading, but where the gradient itself is to be differentiated."""
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[5], ctx.needs_input_grad[6])
        dx, dA, dB = _gradients(ctx, grads[0], needs)
        return dx, None, None, None, None, dA, dB, None, None


class _First(torch.autograd.Function):
    """The first layer to read an x that needs a gradient: it also gives the token, and finishes dX."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        A: Tensor,
        B: Tensor,
        scale: float,
        reading: Reading,
    ) -> tuple[Tensor, Tensor]:
        """(..., m) and the token."""
        return _Next.forward(ctx, x, None, weight, bias, transposed, A, B, scale, reading), x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Runs after every layer that took the token."""
        if _open.reading is ctx.reading:
            _open.close()
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[4], ctx.needs_input_grad[5])
        dx, dA, dB = _gradients(ctx, grads[0], needs)
        if dx is None and (whole := ctx.reading.finish()) is not None:
            dx = whole.view(ctx.shape)
        return dx, None, None, None, dA, dB, None, None


def _gradients(
    ctx: Any, g: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dA and dB, as x, A and B need theirs; the share of dX is left in the reading.

    dX itself comes back only under `create_graph=True`, where all three are made by operations that can be
    differentiated again.
    """
    if g is None:  # this output was not used, or its gradient went through in an earlier pass
        return None, None, None
    x, z, weight, A, B = ctx.saved_tensors
    reading, dtype = ctx.reading, ctx.reading.dtype
    weight = weight.t() if ctx.transposed else weight
    a, b, rows = A.to(dtype), B.to(dtype), x.reshape(-1, x.shape[-1])
    g = g.contiguous().view(-1, g.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        if torch.is_grad_enabled():
            keep = 1.0 if reading.drop is None else reading.drop.keep(rows).to(dtype)
            dz, seen = (g @ b) * ctx.scale, rows * keep
            dB = g.t() @ (seen @ a.t() * ctx.scale)
            return (g @ weight + (dz @ a) * keep).view(x.shape), (dz.t() @ seen).to(A.dtype), dB.to(B.dtype)
        dA = dB = None
        if needs[2]:
            dB = torch.mm(z, g).t().to(B.dtype)
        if needs[0] or needs[1]:
            reading.begin()
            dz = torch.mm(b.t(), g.t()).mul_(ctx.scale)
            if needs[1]:
                dA = torch.mm(dz, reading.see(rows)).to(A.dtype)
            if needs[0]:
                reading.add(g, weight, dz, a)
            else:
                reading.seen = None  # no first layer will come to let it go
    return None, dA, dB
