"""What layers that read one tensor share: who may join, and the dX into which each adds its own."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_lightning.lora.drops import Dropout


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
    dx: Tensor | None = None
    """(n, k): the sum of g W0 over the layers whose backward has run."""
    backward: int = -1
    """The backward pass that `dx` belongs to."""
    x: Tensor | None = None
    """What was read, from a sibling's backward to the first's: its own may be freed by a pass that went before."""

    def add(self, g: Tensor, weight: Tensor) -> None:
        """One layer's share of dX: g (n, m) times W0 (m, k)."""
        self.dx = torch.mm(g, weight) if (dx := self.taken()) is None else dx.addmm_(g, weight)
        self.backward = torch._C._current_graph_task_id()

    def taken(self) -> Tensor | None:
        """What was added in this backward pass; one that ended before it came to the first layer is forgotten."""
        dx, self.dx = self.dx, None
        return dx if self.backward == torch._C._current_graph_task_id() else None


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
        if self.source is None or self.source() is not x or self.state != state or x.is_inference():
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
