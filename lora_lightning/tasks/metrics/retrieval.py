"""Retrieval of each anchor's positive among the candidates of all processes: the loss, and ranks over a stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lora_lightning.lora.layers.functional import wide_dtype

Figure = Literal["loss", "mrr", "recall@1", "recall@5"]
AT_ONCE = 1024
"""Anchors at most that are compared with all candidates at once."""


def info_nce(
    anchors: Tensor, candidates: Tensor, positive_rows: Tensor, groups: Tensor, temperature: Tensor | float = 1.0
) -> Tensor:
    """Each anchor's `-log softmax(sim / temperature)` at its positive (arXiv 1807.03748), (n,).

    Other candidates of the positive's group are no negatives, and are left out.

    Args:
        anchors: (n, d).
        candidates: (m, d).
        positive_rows: (n,), the index of each anchor's positive among the candidates.
        groups: (m,), of the candidates.
        temperature: divisor of similarities.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        wide = wide_dtype(anchors)
        logits = anchors.to(wide) @ candidates.to(wide).T / temperature
        logits = logits.masked_fill(_also_right(positive_rows, groups), -torch.inf)
        return F.cross_entropy(logits, positive_rows, reduction="none")


def ranks(anchors: Tensor, candidates: Tensor, positive_rows: Tensor, groups: Tensor) -> Tensor:
    """The rank of each anchor's positive, (n,): 1 plus the number of other groups with a nearer candidate.

    An equally near group counts a half, so that equal embeddings for all texts get a bad rank.
    """
    logits = anchors @ candidates.T
    numbers = torch.unique(groups, return_inverse=True)[1]
    nearest = logits.new_full((len(anchors), int(numbers.max()) + 1), -torch.inf)
    nearest.scatter_reduce_(1, numbers.expand(len(anchors), -1), logits, "amax")
    nearest.scatter_(1, numbers[positive_rows].unsqueeze(1), -torch.inf)
    right = logits.gather(1, positive_rows.unsqueeze(1))
    return 1 + (nearest > right).sum(1) + (nearest == right).sum(1) / 2


def _also_right(positive_rows: Tensor, groups: Tensor) -> Tensor:
    """(n, m): whether a candidate is of the positive's group, but not the positive."""
    same = groups[positive_rows].unsqueeze(1) == groups.unsqueeze(0)
    return same.scatter(1, positive_rows.unsqueeze(1), False)


class Retrieval(Metric):
    """A metric over all pairs of a stage: each anchor is compared with all positives and hard negatives.

    So it does not depend on the batch size or on the distribution of pairs over batches and processes.

    Args:
        figure: `loss`, or by rank (see `ranks`): `recall@k`, the share within k, or `mrr`, the mean of 1 / rank.
        symmetric: whether the loss is also taken from positives to anchors.
    """

    full_state_update = False
    anchors: list[Tensor]
    candidates: list[Tensor]
    groups: list[Tensor]
    extra: list[Tensor]
    extra_groups: list[Tensor]

    def __init__(self, figure: Figure, symmetric: bool = False) -> None:
        super().__init__()
        assert figure in get_args(Figure)
        self.figure, self.symmetric = figure, symmetric
        for name in ("anchors", "candidates", "groups", "extra", "extra_groups"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, groups: Tensor) -> None:
        """Add n pairs.

        Args:
            embeddings: (n, p, d): anchor, positive and p - 2 hard negatives; products with the anchor are logits.
            groups: (n, p - 1): of the positive and of the negatives; -1 for one without a group.
        """
        self.anchors.append(embeddings[:, 0])
        self.candidates.append(embeddings[:, 1])
        self.groups.append(groups[:, 0])
        if embeddings.shape[1] > 2:
            self.extra.append(embeddings[:, 2:].flatten(0, 1))
            self.extra_groups.append(groups[:, 1:].flatten())

    def compute(self) -> Tensor:
        """The metric, a scalar."""
        anchors, positives = dim_zero_cat(self.anchors), dim_zero_cat(self.candidates)
        candidates = torch.cat([positives, *_all(self.extra)])
        groups = number_singles(torch.cat([dim_zero_cat(self.groups), *_all(self.extra_groups)]))
        every = torch.arange(len(anchors), device=anchors.device)
        if self.figure == "loss":
            losses = _in_parts(lambda a, rows: info_nce(a, candidates, rows, groups), anchors, every)
            if self.symmetric:
                back = groups[: len(every)]
                other = _in_parts(lambda p, rows: info_nce(p, anchors, rows, back), positives, every)
                losses = (losses + other) / 2
            return losses.mean()
        ranked = _in_parts(lambda a, rows: ranks(a, candidates, rows, groups), anchors, every)
        if self.figure == "mrr":
            return ranked.reciprocal().mean()
        return (ranked <= int(self.figure.partition("@")[2])).to(ranked.dtype).mean()


def number_singles(groups: Tensor) -> Tensor:
    """Give each -1 a new group number."""
    alone = groups < 0
    singles = groups.max().clamp(min=-1) + 1 + alone.cumsum(0)
    return torch.where(alone, singles, groups)


def _all(states: list[Tensor] | Tensor) -> list[Tensor]:
    """A list state, or its concatenation after synchronization."""
    return [dim_zero_cat(states)] if len(states) else []


def _in_parts(function: Callable[[Tensor, Tensor], Tensor], rows: Tensor, positive_rows: Tensor) -> Tensor:
    return torch.cat(
        [function(r, o) for r, o in zip(torch.split(rows, AT_ONCE), torch.split(positive_rows, AT_ONCE), strict=True)]
    )


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
