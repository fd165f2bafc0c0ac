"""A batch whose rows have different adapters: the grouped forms of the update, as pure functions of tensors.

Shapes: `n` entries along dimension `dim` of x and of the layer's output; a group is a vector of entries' numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Group = tuple[Tensor, Callable[[Tensor], Tensor]]
"""Entries, and what maps their inputs to their updates or outputs."""


def add_by_group(out: Tensor, x: Tensor, groups: Iterable[Group], dim: int = 0) -> Tensor:
    """`out_i + update_g(x_i)` for every entry i of group g, in place; entries of no group stay."""
    for entries, update in groups:
        out.index_add_(dim, entries, update(x.index_select(dim, entries)).to(out.dtype))
    return out


def put_by_group(out: Tensor, x: Tensor, groups: Iterable[Group], dim: int = 0) -> Tensor:
    """`output_g(x_i)` for every entry i of group g, in place; entries of no group stay."""
    for entries, output in groups:
        out.index_copy_(dim, entries, output(x.index_select(dim, entries)).to(out.dtype))
    return out


def entries_of(rows: list[int], size: int, count: int, *, inner: bool = False) -> Tensor:
    """The entries that belong to `rows`, where `size` entries are those of `count` rows.

    An entry's row changes slowest, as in (count, length) flattened; or quickest, `inner`, as in (length, count).
    """
    each = size // count
    entries = torch.arange(size)
    entries = entries.view(each, count).mT if inner else entries.view(count, each)
    return entries[rows].flatten()
