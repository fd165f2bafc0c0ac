"""One label for each image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import StepOutput, Task
from lora_lightning.tasks.classification import checked_count, class_logits
from lora_lightning.tasks.images import image_inputs

TOP = 5
"""ImageNet's second measure: the label is among so many most probable ones. Told from twice as many classes on."""


class ImageClassification(Task):
    """Cross-entropy over `num_classes`; accuracy over images, also among the top 5 of 10 classes or more, and macro F1.

    The backbone takes `pixel_values` (n, 3, h, w) by that name, as transformers' models do, or as its first argument,
    as those of timm and torchvision do.

    Args:
        num_classes: number of labels. The data's own count by default.
        label_smoothing: share of the target spread over all classes.
    """

    monitor = "val/accuracy"
    monitor_mode = "max"

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        checked_count(num_classes)
        if not 0 <= label_smoothing < 1:
            raise LoRAError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        metrics: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "f1": MulticlassF1Score(num_classes, average="macro"),
        }
        if num_classes >= 2 * TOP:
            metrics[f"accuracy_top{TOP}"] = MulticlassAccuracy(num_classes, average="micro", top_k=TOP)
        super().__init__(MetricCollection(metrics))
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing

    def inputs(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        return image_inputs(backbone, batch)

    def step(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """`batch` holds `pixel_values` (n, 3, h, w) and `labels` (n,) in [0, num_classes)."""
        inputs = self.inputs(backbone, batch)
        if "labels" not in batch:
            raise LoRAError(f"the batch has no 'labels', only {', '.join(batch)}")
        logits, labels = class_logits(backbone(**inputs), self.num_classes).float(), batch["labels"]
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return StepOutput(loss=loss, weight=len(labels), predictions=logits, targets=labels)

    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Probabilities (n, num_classes) and the most probable label (n,)."""
        logits = class_logits(backbone(**self.inputs(backbone, batch)), self.num_classes)
        probabilities = logits.float().softmax(-1)
        return {"prediction": probabilities.argmax(-1), "probabilities": probabilities}
