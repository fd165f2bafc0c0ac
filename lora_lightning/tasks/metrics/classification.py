"""Metrics of classifications by their names in a config."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef

from lora_lightning.lora.errors import LoRAError, did_you_mean


class PositiveF1(BinaryF1Score):
    """F1 of class 1 from the logits (n, 2) of both classes."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds.argmax(-1), target)


METRICS: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda n: MulticlassAccuracy(n, average="micro"),
    "f1": lambda n: MulticlassF1Score(n, average="macro"),
    "binary_f1": lambda n: PositiveF1(),
    "matthews": MulticlassMatthewsCorrCoef,
}
"""Makers of metrics over logits (n, num_classes) and labels (n,), by name."""


def metrics_of(names: Sequence[str], num_classes: int) -> MetricCollection:
    """The named metrics under their names.

    Raises:
        LoRAError: there is no name, an unknown one, or one for two classes where there are more.
    """
    if not names:
        raise LoRAError(f"metrics: name at least one of {', '.join(METRICS)}: the first chooses the best checkpoint")
    for name in names:
        if name not in METRICS:
            raise LoRAError(f"metrics: '{name}' is none of {', '.join(METRICS)}{did_you_mean(name, METRICS)}")
    if "binary_f1" in names and num_classes != 2:
        raise LoRAError(f"metrics: binary_f1 is the F1 of class 1 of 2, and there are {num_classes} classes: take f1")
    # Without groups: torchmetrics merges metrics whose states are equal after one batch, which may be by chance.
    return MetricCollection({name: METRICS[name](num_classes) for name in names}, compute_groups=False)
