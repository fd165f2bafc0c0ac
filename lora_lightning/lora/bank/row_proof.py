"""Which dimension of a layer's input holds the rows: proven by running the batch and its mirror image at once.

A size that equals the number of rows proves nothing: there may be as many positions, learned queries or tokens of an
expert. So the plain model runs once more, on the rows and then the same rows backwards. Where the rows lie, exactly one
dimension doubles, and what it holds reads the same backwards: entry by entry where the row changes quickest, block by
block where it changes slowest. Whatever leaves two answers, or none, has no answer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Layout = tuple[int, bool]
"""The dimension of the rows, and whether the row changes quickest there, as in (length, rows) flattened."""
Calls = dict[tuple[str, int], "Seen"]
"""By the layer's name and the number of its call within one of the model."""


@dataclass
class Seen:
    """What a layer saw of the rows and their mirror image."""

    shape: torch.Size
    layouts: dict[int, list[bool]]
    """By dimension, whether the row may change quickest, slowest, or either."""


@dataclass
class Proof:
    """Of one signature of the model's call."""

    count: int = 0
    calls: Calls = field(default_factory=dict)
    picks: bool = False
    """Whether the model picks entries by their values, as experts do: a flattened input is then no proof."""

    def layout(self, call: tuple[str, int], x: Tensor) -> Layout | None:
        """Where the rows of x are; None where that cannot be known."""
        seen = self.calls.get(call)
        if seen is None or len(seen.shape) != x.dim():
            return None
        moved = [dim for dim, (now, twice) in enumerate(zip(x.shape, seen.shape, strict=True)) if now != twice]
        if len(moved) != 1 or seen.shape[moved[0]] != 2 * x.shape[moved[0]]:
            return None
        dim, inner = moved[0], seen.layouts.get(moved[0], [])
        if self.picks and (x.dim() < 3 or dim != 0 or x.shape[0] != self.count):
            return None
        return (dim, inner[0]) if len(inner) == 1 else None


def layouts(x: Tensor, count: int, dims: Collection[int]) -> dict[int, list[bool]]:
    """Of x, made of `count` rows and the same backwards: where it reads the same backwards, among `dims`."""
    found: dict[int, list[bool]] = {}
    for dim in dims:
        each, rest = divmod(x.shape[dim], 2 * count)
        if rest or not each:
            continue
        # (rows, each): the row changes slowest; (each, rows): quickest. They are one where each is 1.
        ways = {False: (2 * count, each), True: (each, 2 * count)}
        inner = [way for way in ([False] if each == 1 else ways) if _mirrored(_split(x, dim, ways[way]), dim + way)]
        if inner:
            found[dim] = inner
    return found


def _split(x: Tensor, dim: int, sizes: tuple[int, int]) -> Tensor:
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def _mirrored(x: Tensor, dim: int) -> bool:
    """Whether x reads the same backwards along `dim`, up to the rounding of products of other shapes."""
    first, second = x.chunk(2, dim)
    second = second.flip(dim)
    if not x.is_floating_point():
        return torch.equal(first, second)
    size = float(torch.where(x.isfinite(), x, 0).abs().max()) if x.numel() else 0.0
    near = min(0.05, 16 * torch.finfo(x.dtype).eps ** 0.5)
    return torch.allclose(first, second, rtol=near, atol=near * size, equal_nan=True)


def signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a proof holds for: names, shapes and dtypes of tensors, settings, kinds of whatever else is passed."""
    return tuple((name, *map(_told, tree_leaves(value))) for name, value in [*enumerate(args), *sorted(kwargs.items())])


def _told(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    return value if isinstance(value, bool | int | float | str | None) else type(value)
