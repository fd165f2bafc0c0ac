"""Embeddings in which matching inputs are near: texts and texts by one encoder, images and texts by two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection

from lora_lightning.lora.errors import LoRAError, did_you_mean
from lora_lightning.lora.layers.functional import wide_dtype
from lora_lightning.tasks.base import Stage, StepOutput, Task, inputs_of
from lora_lightning.tasks.metrics.retrieval import Figure, Retrieval, gather_rows, info_nce, number_singles

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
        if pooling not in get_args(Pooling):
            known = get_args(Pooling)
            raise LoRAError(f"pooling is one of {', '.join(known)}, got {pooling!r}{did_you_mean(str(pooling), known)}")
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
        parts, groups = self._embed_parts(backbone, batch)
        anchors, positives = parts[0], parts[1]
        scale = self._scale(backbone)
        gathered = gather_rows(positives) if self.gather else (positives, 0)
        positive_rows = torch.arange(len(positives), device=positives.device) + gathered[1]
        numbers = gather_rows(groups)[0] if self.gather else groups
        candidates = [gathered[0]]
        if len(parts) > 2:
            candidates.append(gather_rows(parts[2])[0] if self.gather else parts[2])
        right = number_singles(numbers.T.flatten())
        losses = info_nce(anchors, torch.cat(candidates), positive_rows, right, 1 / scale)
        if self.symmetric:
            others = gather_rows(anchors)[0] if self.gather else anchors
            losses = (losses + info_nce(positives, others, positive_rows, right[: len(others)], 1 / scale)) / 2
        return StepOutput(loss=losses.mean(), weight=len(losses))

    def evaluate(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """Embeddings (n, p, d) of anchors, positives and negatives, and the groups, for the metrics over the stage."""
        parts, groups = self._embed_parts(backbone, batch)
        embeddings = torch.stack((parts[0] * self._scale(backbone), *parts[1:]), 1)
        return StepOutput(embeddings.new_zeros(()), len(groups), embeddings, groups)

    def update(self, stage: Stage, out: StepOutput) -> dict[str, Any]:
        """Add a batch: in training its loss, in evaluation its pairs."""
        if stage == "train":
            return super().update(stage, out)
        metrics = self.metrics[f"{stage}_"]
        assert isinstance(metrics, MetricCollection)
        assert out.predictions is not None
        metrics.update(out.predictions.detach(), out.targets)
        return dict(metrics.items(keep_base=False))

    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Embeddings (n, d): of the anchors, and of positives and negatives, if any; or of images and texts."""
        if "anchor" in batch:
            return {
                "embedding" if name == "anchor" else f"{name}_embedding": self._encode(backbone, batch[name])
                for name in PARTS
                if name in batch
            }
        image, text = self._towers(backbone, batch)
        return {"image_embedding": image, "text_embedding": text}

    def _embed_parts(self, backbone: nn.Module, batch: Mapping[str, Any]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Embeddings (n, d) of each part, and the candidates' groups (n, parts - 1)."""
        if not isinstance(batch, Mapping) or ("anchor" in batch and "positive" not in batch):
            got = ", ".join(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise LoRAError(
                f"a batch of pairs has an anchor and a positive, or a two-tower model's arguments; got {got}"
            )
        if "anchor" in batch:
            parts = tuple(self._encode(backbone, batch[name]) for name in PARTS if name in batch)
        else:
            parts = self._towers(backbone, batch)
        shape = (len(parts[0]), len(parts) - 1)
        groups = batch.get("labels")
        if groups is None:
            groups = torch.full(shape, -1, device=parts[0].device)
        if tuple(groups.shape) != shape:
            raise LoRAError(f"labels must be {shape}, a group for each candidate of a row, got {tuple(groups.shape)}")
        return parts, groups

    def _encode(self, backbone: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        output = backbone(**inputs)
        if isinstance(output, Tensor) and output.dim() == 2:
            return self._finish(output)
        states = output.get("last_hidden_state") if isinstance(output, Mapping) else output
        if not isinstance(states, Tensor) or states.dim() != 3:
            keys = list(output) if isinstance(output, Mapping) else type(output).__name__
            raise LoRAError(
                f"the backbone must return last_hidden_state (n, t, d) or embeddings (n, d), got {keys}: take"
                " auto_class: AutoModel, a model without a head"
            )
        mask = inputs.get("attention_mask")
        return self._finish(
            pool(states, torch.ones(states.shape[:2]).to(states) if mask is None else mask, self.pooling)
        )

    def _towers(self, backbone: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        output = backbone(**inputs_of(batch, "labels"))
        embeddings = [
            output.get(name) if isinstance(output, Mapping) else None for name in ("image_embeds", "text_embeds")
        ]
        if not all(isinstance(part, Tensor) for part in embeddings):
            keys = ", ".join(output) if isinstance(output, Mapping) else type(output).__name__
            raise LoRAError(
                f"a two-tower model must return image_embeds and text_embeds, got {keys}; for pairs of texts a batch"
                " has an anchor and a positive"
            )
        return self._finish(embeddings[0]), self._finish(embeddings[1])  # type: ignore[arg-type]

    def _finish(self, embeddings: Tensor) -> Tensor:
        wide = embeddings.to(wide_dtype(embeddings))
        return F.normalize(wide, dim=-1) if self.normalize else wide

    def _scale(self, backbone: nn.Module) -> Tensor | float:
        """1 / temperature."""
        if self.temperature is not None:
            return 1 / self.temperature
        logit_scale = getattr(backbone, "logit_scale", None)
        if not isinstance(logit_scale, Tensor):
            raise LoRAError(f"{type(backbone).__name__} has no logit_scale of its own: give the task a temperature")
        return logit_scale.exp()


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
