"""Gathers rows of all processes in each of them, with gradients that go back to a row's process."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable


class Gathered(NamedTuple):
    """Rows of all processes, in the order of their ranks."""

    rows: Tensor
    """(N, ...)."""
    start: int
    """The index of this process's first row."""


def gather_rows(rows: Tensor) -> Gathered:
    """The concatenated `rows` (n, ...) of all processes; n may differ.

    Backward sums the gradients of all processes' losses for this process's rows. Every process must call both.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return Gathered(rows, 0)
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    gathered = _Gather.apply(rows, sizes)  # type: ignore[no-untyped-call]
    return Gathered(gathered, sum(sizes[: distributed.get_rank()]))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, by_rows: Tensor) -> tuple[Tensor, None]:
        total = by_rows.contiguous().clone()
        distributed.all_reduce(total)
        start = sum(ctx.sizes[: distributed.get_rank()])
        return total[start : start + ctx.sizes[distributed.get_rank()]], None
