"""Embeddings in which matching inputs are near: texts and texts by one encoder, images and texts by two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from lora_lightning.lora.errors import LoRAError, refuse_unknown
from lora_lightning.lora.layers.functional import wide_dtype
from lora_lightning.tasks.base import StepOutput, Task, inputs_of

Pooling = Literal["mean", "cls", "last"]
PARTS = ("anchor", "positive", "negative")


class ContrastiveEmbedding(Task):
    """InfoNCE: each anchor should be nearer to its positive than to all other positives of the batch.

    These are the negatives, with the hard negatives of all rows if there are any; positives of the same group
    (`labels`) are left out. With several processes the candidates of all are used, and gradients go back to the process
    of each, so that N processes equal one with N times the batch. Accumulated batches do not: each has only its own
    candidates.

    Evaluation is over the whole stage: each anchor is compared with all positives. `loss` is over the same
    candidates; `recall@k` is the share of positives among the k nearest, `mrr` the mean of 1 / rank.

    Args:
        temperature: fixed divisor of cosine similarities; None takes the model's frozen `logit_scale`, such as CLIP's.
        pooling: how a text's token states become its embedding: their `mean`, the first (`cls`), or the `last`. Not
            used where a model returns embeddings (n, d) or, as CLIP, `image_embeds` and `text_embeds`.
        symmetric: also take the loss from positives to anchors, and average, as CLIP does (arXiv 2103.00020).
        normalize: scale embeddings to length 1 first, so that products are cosines.
        gather: use the candidates of all processes.
    """

    monitor = "val/mrr"
    monitor_mode = "max"
    peft_task_type = "FEATURE_EXTRACTION"

    def __init__(
        self,
        temperature: float | None = 0.05,
        pooling: Pooling = "mean",
        symmetric: bool = False,
        normalize: bool = True,
        gather: bool = True,
    ) -> None:
        if temperature is not None and not temperature > 0:
            raise LoRAError(f"temperature must be above 0, or null for the model's own logit_scale, got {temperature}")
        refuse_unknown("pooling", pooling, get_args(Pooling))
        figures: tuple[Figure, ...] = ("loss", "mrr", "recall@1", "recall@5")
        metrics: dict[str, Metric | MetricCollection] = {name: Retrieval(name, symmetric) for name in figures}
        super().__init__(MetricCollection(metrics, compute_groups=False))
        self.metrics["train_"] = MetricCollection({})
        self.temperature, self.pooling = temperature, pooling
        self.symmetric, self.normalize, self.gather = symmetric, normalize, gather

    def inputs(self, backbone: nn.Module, batch: Any) -> Any:
        """The backbone's arguments; for pairs of texts, the anchors."""
        return batch["anchor"] if "anchor" in batch else super().inputs(backbone, batch)

    def step(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """The loss of n pairs.

        Args:
            backbone: an encoder of texts, or a model of two towers.
            batch: `anchor`, `positive` and, if there are any, `negative`, each a mapping to the encoder's arguments; or
                the two towers' arguments, where images are the anchors. `labels` (n, 1), or (n, 2) with negatives, are
                the group numbers of positives and negatives; -1 for one without a group.
        """
        parts, groups = self._parts(backbone, batch)
        anchors, positives = parts[0], parts[1]
        temperature = 1 / self._scale(backbone)
        every, before = zip(*(gather_rows(part, self.gather) for part in (*parts[1:], groups)), strict=True)
        own = torch.arange(len(positives), device=positives.device) + before[0]
        right = number_singles(every[-1].T.flatten())
        losses = info_nce(anchors, torch.cat(every[:-1]), own, right, temperature)
        if self.symmetric:
            others, _ = gather_rows(anchors, self.gather)
            losses = (losses + info_nce(positives, others, own, right[: len(others)], temperature)) / 2
        return StepOutput(loss=losses.mean(), weight=len(losses))

    def evaluate(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """Embeddings (n, p, d) of anchors, positives and negatives, and the groups, for the metrics over the stage."""
        parts, groups = self._parts(backbone, batch)
        embeddings = torch.stack((parts[0] * self._scale(backbone), *parts[1:]), 1)
        return StepOutput(embeddings.new_zeros(()), len(groups), embeddings, groups)

    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Embeddings (n, d): of the anchors, and of positives and negatives, if any; or of images and texts."""
        parts = self._embeddings(backbone, batch)
        return {"embedding" if name == "anchor" else f"{name}_embedding": part for name, part in parts.items()}

    def _parts(self, backbone: nn.Module, batch: Mapping[str, Any]) -> tuple[list[Tensor], Tensor]:
        """Embeddings (n, d) of each part, and the candidates' groups (n, parts - 1)."""
        if not isinstance(batch, Mapping) or ("anchor" in batch and "positive" not in batch):
            got = ", ".join(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise LoRAError(
                f"a batch of pairs has an anchor and a positive, or a two-tower model's arguments; got {got}"
            )
        parts = list(self._embeddings(backbone, batch).values())
        shape = (len(parts[0]), len(parts) - 1)
        groups = batch.get("labels")
        if groups is None:
            groups = torch.full(shape, -1, device=parts[0].device)
        if tuple(groups.shape) != shape:
            raise LoRAError(f"labels must be {shape}, a group for each candidate of a row, got {tuple(groups.shape)}")
        return parts, groups

    def _embeddings(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Embeddings (n, d) of anchor, positive and negative, as far as the batch has them; or of image and text."""
        if "anchor" in batch:
            found: dict[str, Any] = {name: self._encode(backbone, batch[name]) for name in PARTS if name in batch}
        else:
            output = backbone(**inputs_of(batch, "labels"))
            named = output if isinstance(output, Mapping) else {}
            found = {name: named.get(f"{name}_embeds") for name in ("image", "text")}
            if not all(isinstance(part, Tensor) for part in found.values()):
                raise LoRAError(
                    f"a two-tower model must return image_embeds and text_embeds, got {_what(output)}; for pairs of"
                    " texts a batch has an anchor and a positive"
                )
        wide = {name: part.to(wide_dtype(part)) for name, part in found.items()}
        return {name: F.normalize(part, dim=-1) for name, part in wide.items()} if self.normalize else wide

    def _encode(self, backbone: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        output = backbone(**inputs)
        states = output.get("last_hidden_state") if isinstance(output, Mapping) else output
        if isinstance(output, Tensor) and output.dim() == 2:
            return output
        if not isinstance(states, Tensor) or states.dim() != 3:
            raise LoRAError(
                f"the backbone must return last_hidden_state (n, t, d) or embeddings (n, d), got {_what(output)}: take"
                " auto_class: AutoModel, a model without a head"
            )
        mask = inputs.get("attention_mask")
        return pool(states, states.new_ones(states.shape[:2]) if mask is None else mask, self.pooling)

    def _scale(self, backbone: nn.Module) -> Tensor | float:
        """1 / temperature."""
        if self.temperature is not None:
            return 1 / self.temperature
        logit_scale = getattr(backbone, "logit_scale", None)
        if not isinstance(logit_scale, Tensor):
            raise LoRAError(f"{type(backbone).__name__} has no logit_scale of its own: give the task a temperature")
        return logit_scale.exp()


def _what(output: Any) -> str:
    """The keys of an output, or its class."""
    return ", ".join(output) if isinstance(output, Mapping) else type(output).__name__


def pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector (n, d), in float32 or wider, for the states (n, t, d) of the tokens in `mask` (n, t)."""
    states = states.to(wide_dtype(states))
    if pooling == "cls":
        return states[torch.arange(len(states)), mask.long().argmax(1)]
    if pooling == "last":
        last = (mask.long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        return states[torch.arange(len(states)), last]
    weights = mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


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
        also_right = (groups[positive_rows].unsqueeze(1) == groups).scatter(1, positive_rows.unsqueeze(1), False)
        logits = logits.masked_fill(also_right, -torch.inf)
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

        def compare(function: Callable[..., Tensor], rows: Tensor, others: Tensor, of_others: Tensor) -> Tensor:
            parts = zip(torch.split(rows, AT_ONCE), torch.split(every, AT_ONCE), strict=True)
            return torch.cat([function(part, others, own, of_others) for part, own in parts])

        if self.figure == "loss":
            losses = compare(info_nce, anchors, candidates, groups)
            if self.symmetric:
                losses = (losses + compare(info_nce, positives, anchors, groups[: len(every)])) / 2
            return losses.mean()
        ranked = compare(ranks, anchors, candidates, groups)
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


def gather_rows(rows: Tensor, wanted: bool = True) -> tuple[Tensor, int]:
    """The `rows` (n, ...) of all processes, in the order of ranks, and the index of this one's first; n may differ.

    Unless `wanted`, those of this process. Backward sums the gradients of all processes' losses for this process's
    rows. Every process must call both.
    """
    if (
        not wanted
        or not (distributed.is_available() and distributed.is_initialized())
        or distributed.get_world_size() == 1
    ):
        return rows, 0
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    return _Gather.apply(rows, sizes), sum(sizes[: distributed.get_rank()])  # type: ignore[no-untyped-call]


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
