"""One label for each text or pair of texts: GLUE's classification tasks, sentiment, topics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import StepOutput, Task, inputs_and_labels, inputs_of, logits_each, refuse_no_count
from lora_lightning.tasks.metrics.classification import metrics_of


class SequenceClassification(Task):
    """Cross-entropy over `num_classes` logits, two for a binary task.

    Args:
        num_classes: number of labels. The data's own count by default.
        label_smoothing: share of the target spread over all classes.
        metrics: some of `accuracy` over examples, `f1` (the mean of the classes' own), `binary_f1` (of class 1 of two,
            as GLUE asks of MRPC and QQP) and `matthews` (Matthews' correlation, as of CoLA). The first chooses the
            best checkpoint.

    Raises:
        LoRAError: fewer than two classes, or an unknown metric.
    """

    monitor_mode = "max"
    peft_task_type = "SEQ_CLS"
    problem_type = "single_label_classification"

    def __init__(
        self, num_classes: int, label_smoothing: float = 0.0, metrics: Sequence[str] = ("accuracy", "f1")
    ) -> None:
        refuse_no_count(num_classes, "num_classes")
        if num_classes < 2:
            raise LoRAError(
                f"classification needs at least 2 classes, got {num_classes}: are the labels in data.label_column, or"
                " name them all as data.label_names"
            )
        super().__init__(metrics_of(metrics, num_classes))
        self.monitor = f"val/{metrics[0]}"
        self.num_classes = self.outputs = num_classes
        self.label_smoothing = label_smoothing

    def step(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """`batch` holds the backbone's keyword arguments and `labels` (n,) in [0, num_classes)."""
        inputs, labels = inputs_and_labels(batch)
        logits = logits_each(backbone(**inputs), self.num_classes, "class")
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return StepOutput(loss=loss, weight=len(labels), predictions=logits, targets=labels)

    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Probabilities (n, num_classes) and the most probable label (n,)."""
        output = backbone(**inputs_of(batch, "labels"))
        probabilities = logits_each(output, self.num_classes, "class").softmax(-1)
        return {"prediction": probabilities.argmax(-1), "probabilities": probabilities}


@torch.no_grad()
def mean_features(backbone: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Mean of a transformers backbone's last hidden states over each text's tokens, (n, d), in float32."""
    hidden = backbone(**inputs_of(batch, "labels"), output_hidden_states=True).hidden_states[-1].float()
    mask = batch["attention_mask"].unsqueeze(-1).float()
    mean: Tensor = (hidden * mask).sum(1) / mask.sum(1)
    return mean
