"""Any number of labels for each example: topics, tags, what an image shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MultilabelExactMatch, MultilabelF1Score

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import StepOutput, Task, inputs_and_labels, inputs_of, logits_each, refuse_no_count


class MultiLabelClassification(Task):
    """Binary cross-entropy of each label, and F1 over all decisions (micro) and as the mean of the labels' own (macro).

    For logits z and targets t in {0, 1}, `-t log sigmoid(z) - (1 - t) log sigmoid(-z)`, the mean over examples.
    `subset_accuracy` counts the examples whose labels are right to the last.

    Args:
        num_classes: number of labels. The data's own count by default.
        threshold: a label is given where its probability is above this.
        over_labels: whether an example's loss is the `mean` or the `sum` over its labels.

    Raises:
        LoRAError: fewer than two labels, or a threshold that is no probability.
    """

    monitor = "val/micro_f1"
    monitor_mode = "max"
    peft_task_type = "SEQ_CLS"
    problem_type = "multi_label_classification"
    output_is = "label"

    def __init__(self, num_classes: int, threshold: float = 0.5, over_labels: Literal["mean", "sum"] = "mean") -> None:
        refuse_no_count(num_classes, "num_classes")
        if num_classes < 2:
            raise LoRAError(
                f"multi-label classification needs at least 2 labels, got {num_classes}: take one of two classes"
            )
        if not 0 < threshold < 1:
            raise LoRAError(f"threshold must be a probability above 0 and below 1, got {threshold}")
        if over_labels not in ("mean", "sum"):
            raise LoRAError(f"over_labels must be mean or sum, got {over_labels!r}")
        metrics = {
            "micro_f1": MultilabelF1Score(num_classes, average="micro"),
            "macro_f1": MultilabelF1Score(num_classes, average="macro"),
            "subset_accuracy": MultilabelExactMatch(num_classes),
        }
        super().__init__(MetricCollection(dict(metrics)))
        self.num_classes, self.threshold, self.over_labels = num_classes, threshold, over_labels
        self.outputs = num_classes

    def step(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """`batch` holds the backbone's keyword arguments and `labels` (n, num_classes), each 0 or 1."""
        inputs, labels = inputs_and_labels(batch)
        logits = logits_each(backbone(**inputs), self.num_classes, "label")
        if labels.shape != logits.shape:
            raise LoRAError(f"labels must be {tuple(logits.shape)}, a 0 or 1 for each label, got {tuple(labels.shape)}")
        loss = F.binary_cross_entropy_with_logits(logits, labels.float())
        if self.over_labels == "sum":
            loss = loss * self.num_classes
        return StepOutput(
            loss=loss, weight=len(labels), predictions=self._chosen(logits.sigmoid()), targets=labels.int()
        )

    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The numbers of each example's labels, a tensor for each example, and probabilities (n, num_classes)."""
        output = backbone(**inputs_of(batch, "labels"))
        probabilities = logits_each(output, self.num_classes, "label").sigmoid()
        numbers = [row.nonzero().flatten() for row in self._chosen(probabilities)]
        return {"prediction": numbers, "probabilities": probabilities}

    def _chosen(self, probabilities: Tensor) -> Tensor:
        """1 where a label is given, else 0."""
        return (probabilities > self.threshold).int()
