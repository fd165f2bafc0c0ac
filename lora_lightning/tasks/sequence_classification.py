"""One label for each text or pair of texts: GLUE's classification tasks, sentiment, topics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import StepOutput, Task, inputs_of, logits_of


class SequenceClassification(Task):
    """Cross-entropy over `num_classes`; accuracy over examples and macro F1.

    Args:
        num_classes: number of labels. The data's own count by default.
        label_smoothing: share of the target spread over all classes.
    """

    monitor = "val/accuracy"
    monitor_mode = "max"
    peft_task_type = "SEQ_CLS"

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        if num_classes < 2:
            raise LoRAError(f"classification needs at least 2 classes, got {num_classes}")
        metrics = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "f1": MulticlassF1Score(num_classes, average="macro"),
        }
        super().__init__(MetricCollection(dict(metrics)))
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing

    def step(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """`batch` holds the backbone's keyword arguments and `labels` (n,) in [0, num_classes)."""
        inputs = inputs_of(batch, "labels")
        if "labels" not in batch:
            raise LoRAError(f"the batch has no 'labels', only {', '.join(inputs)}")
        logits, labels = self._logits(backbone, inputs), batch["labels"]
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        return StepOutput(loss=loss, weight=len(labels), predictions=logits.float(), targets=labels)

    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Probabilities (n, num_classes) and the most probable label (n,)."""
        probabilities = self._logits(backbone, inputs_of(batch, "labels")).float().softmax(-1)
        return {"prediction": probabilities.argmax(-1), "probabilities": probabilities}

    def _logits(self, backbone: nn.Module, inputs: dict[str, Any]) -> Tensor:
        logits = logits_of(backbone(**inputs))
        if logits.dim() != 2 or logits.shape[1] != self.num_classes:
            raise LoRAError(
                f"the backbone must return logits (n, {self.num_classes}), one for each class, got"
                f" {tuple(logits.shape)}: give its head {self.num_classes} outputs"
            )
        return logits


@torch.no_grad()
def mean_features(backbone: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Mean of a transformers backbone's last hidden states over each text's tokens, (n, d), in float32."""
    hidden = backbone(**inputs_of(batch, "labels"), output_hidden_states=True).hidden_states[-1].float()
    mask = batch["attention_mask"].unsqueeze(-1).float()
    mean: Tensor = (hidden * mask).sum(1) / mask.sum(1)
    return mean
