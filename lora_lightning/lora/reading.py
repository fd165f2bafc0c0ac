"""What layers that read one tensor share: who may join, and the dX into which each adds its own."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_lightning.lora.drops import Dropout
from lora_lightning.lora.products import Prepare, frozen_product
from lora_lightning.lora.replay import Source


class Down(NamedTuple):
    """A layer's way down to its rank."""

    layer: int
    """Tells the layers that read one x apart, such as by their `id`."""
    A: Tensor
    scale: float
    """s."""


@dataclass
class Reading:
    """What the layers that read one tensor have in common: the dtype of their products, dropout, and dX."""

    dtype: torch.dtype
    drop: Dropout | None
    opened: Open
    """Where it was open to siblings: on a GPU, backward runs in another thread."""
    source: Source | None = None
    """What computes x anew where it is not kept."""
    passes: dict[int, Pass] = field(default_factory=dict)
    """By the number of the backward pass: one may run inside another, or in another thread beside it."""

    def now(self) -> Pass:
        """Of the backward pass that this is called in; forgotten when that ends."""
        number = torch._C._current_graph_task_id()
        if number not in self.passes:
            self.passes[number] = Pass()
            forget: Any = lambda: self.passes.pop(number, None)  # noqa: E731
            torch.autograd.Variable._execution_engine.queue_callback(forget)  # type: ignore[attr-defined]
        return self.passes[number]


@dataclass
class Pass:
    """What one backward pass has brought to the first layer so far."""

    dx: Tensor | None = None
    """(n, k): the sum of g W0 over the layers whose backward has run."""
    x: Tensor | None = None
    """What was read, from a sibling: the first's own may be freed by a pass that went before."""

    def add(self, g: Tensor, weight: Tensor, prepare: Prepare) -> None:
        """One layer's share of dX: g (n, m) times W0 (m, k)."""
        product = frozen_product(g, weight.t(), prepare=prepare, onto=self.dx)
        if product is None:
            product = torch.mm(g, weight) if self.dx is None else self.dx.addmm_(g, weight)
        self.dx = product


@dataclass
class Open:
    """The reading that siblings may join, one in each thread; they are called one after the other.

    Kept apart from `Reading`, which the graph holds: `x` and `zs` hold the graph.
    """

    reading: Reading | None = None
    source: weakref.ref[Tensor] | None = None
    """The tensor that the layers were called with."""
    state: Any = None
    """Its version, and all else that must be the same for who joins."""
    x: Tensor | None = None
    """`source`, cast where autocast says so."""
    zs: dict[int, tuple[Down, int, Tensor]] = field(default_factory=dict)
    """By layer: its A and s, A's version then, and z."""

    def close(self) -> None:
        """Let go of the graph."""
        self.reading = self.source = self.state = self.x = None
        self.zs = {}

    def joined(self, x: Tensor, down: Down, state: Any) -> Tensor | None:
        """z of a layer that reads the same as the first did, once."""
        if state is None or self.source is None or self.source() is not x or self.state != state:
            return None
        was, version, z = self.zs.pop(down.layer, (None, 0, None))
        same = was is not None and was.A is down.A and was.scale == down.scale and version == down.A._version
        return z if same else None


class Thread(threading.local):
    """What is open in each thread, and whether it computes plainly."""

    def __init__(self) -> None:
        self.open = Open()
        self.plain = False


thread = Thread()
