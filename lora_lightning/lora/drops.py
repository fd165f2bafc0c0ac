"""Dropout from random bytes: a seed is kept instead of a mask, and eight bits decide about an element.

So p is rounded to a multiple of 1/256 and the scale corrected to it exactly. On a CPU, rows are worked on some at a
time, so that they stay in its cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**17
"""Elements that are worked on at once on a CPU."""


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
        stay = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        for rows in _blocks(stay):
            words = torch.empty(-(-rows.numel() // 8), dtype=torch.int64, device=x.device)
            random = words.random_(-(2**63), None, generator=generator).view(torch.uint8)[: rows.numel()]
            torch.ge(random.view(rows.shape), self.dropped, out=rows)
        return stay


def dropped_of_256(p: float) -> int:
    """How many of a byte's 256 values drop an element, for a probability of p."""
    return round(256 * p)


def drawn(p: float) -> Dropout | None:
    """With a seed from torch's own generator, which `torch.manual_seed` sets and checkpointing puts back."""
    dropped = dropped_of_256(p)
    return Dropout(dropped, int(torch.randint(2**62, (), dtype=torch.int64))) if dropped else None


def kept(x: Tensor, keep: Tensor) -> Tensor:
    """x (n, k) with zeros where `keep` is False; not scaled."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for to, rows, stay in _blocks(out, x, keep):
        torch.mul(rows, stay.to(x.dtype), out=to)  # many times quicker than `where` on a CPU
    return out


def add_kept_(dx: Tensor, dz: Tensor, A: Tensor, keep: Tensor) -> Tensor:
    """Add dz^T A to dx (n, k) where `keep` is True."""
    for to, rows, stay in _blocks(dx, dz.t(), keep):
        to.addcmul_(torch.mm(rows, A), stay.to(dx.dtype))
    return dx


def _blocks(x: Tensor, *others: Tensor) -> Iterator[Any]:
    """The same rows of each tensor (n, ...), some at a time; all at once on a GPU."""
    rows = max(1, x.shape[0] if x.device.type != "cpu" else BLOCK // max(1, x.shape[1]))
    parts = [torch.split(t, rows) for t in (x, *others)]
    return iter(parts[0]) if not others else zip(*parts, strict=True)
