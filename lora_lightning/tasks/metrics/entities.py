"""Precision, recall and F1 of whole entities, as torchmetrics that sum over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lora_lightning.tasks.losses.token_loss import IGNORED
from lora_lightning.tasks.spans import Tagging


def count_entities(predictions: Tensor, targets: Tensor, tagging: Tagging) -> tuple[int, int, int]:
    """How many entities are (found, predicted, there), over sentences (n, t) of label numbers.

    One is found where kind, first and last word are right. Words whose target is -100 are left out.
    """
    found = predicted = actual = 0
    for guessed, true in zip(predictions.tolist(), targets.tolist(), strict=True):
        words = [i for i, label in enumerate(true) if label != IGNORED]
        guesses, truths = (set(tagging.spans([labels[i] for i in words])) for labels in (guessed, true))
        found += len(guesses & truths)
        predicted, actual = predicted + len(guesses), actual + len(truths)
    return found, predicted, actual


class EntityMetric(Metric):
    """Counts of entities, summed over everything seen: the micro average of seqeval and `conlleval`.

    Args:
        names: the labels, in the order of their numbers.
        strict: count well-formed entities alone; see `Tagging`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    found: Tensor
    predicted: Tensor
    actual: Tensor

    def __init__(self, names: Sequence[str], *, strict: bool = False) -> None:
        super().__init__()
        self.tagging = Tagging(names, strict=strict)
        for state in ("found", "predicted", "actual"):
            self.add_state(state, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count sentences (n, t) of label numbers in; -100 among the targets is left out."""
        found, predicted, actual = count_entities(predictions, targets, self.tagging)
        self.found += found
        self.predicted += predicted
        self.actual += actual


class EntityPrecision(EntityMetric):
    """The share of predicted entities that are there; 0 where none is predicted."""

    def compute(self) -> Tensor:
        return _share(self.found, self.predicted)


class EntityRecall(EntityMetric):
    """The share of entities that are found; 0 where there is none."""

    def compute(self) -> Tensor:
        return _share(self.found, self.actual)


class EntityF1(EntityMetric):
    """The harmonic mean of precision and recall, `2 found / (predicted + there)`; 0 of none."""

    def compute(self) -> Tensor:
        return _share(2 * self.found, self.predicted + self.actual)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole.clamp(min=1)
