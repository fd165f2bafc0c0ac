"""One label for each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import StepOutput, Task, inputs_and_labels, logits_each, refuse_no_count
from lora_lightning.tasks.images import image_inputs
from lora_lightning.tasks.metrics.classification import metrics_of

MANY = 10
"""From so many classes on a top-5 accuracy says something."""


class ImageClassification(Task):
    """Cross-entropy over `num_classes` logits.

    The backbone takes `pixel_values` (n, 3, h, w) by that name, as transformers' models do, or as its first argument,
    as those of timm and torchvision do.

    Args:
        num_classes: number of labels. The data's own count by default.
        label_smoothing: share of the target spread over all classes.
        metrics: some of `accuracy` over images, `f1` (the mean of the classes' own), `binary_f1` (of class 1 of two)
            and `matthews`. The first chooses the best checkpoint. From 10 classes on `accuracy_top5` is told too: the
            share of images whose label is among the five likeliest.

    Raises:
        LoRAError: fewer than two classes, an unknown metric, or a share that is none.
    """

    monitor_mode = "max"

    def __init__(
        self, num_classes: int, label_smoothing: float = 0.0, metrics: Sequence[str] = ("accuracy", "f1")
    ) -> None:
        refuse_no_count(num_classes, "num_classes")
        if num_classes < 2:
            raise LoRAError(
                f"classification needs at least 2 classes, got {num_classes}: are the labels in data.label_column, or"
                " name them all as data.label_names"
            )
        if not 0 <= label_smoothing < 1:
            raise LoRAError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        collection = metrics_of(metrics, num_classes)
        if num_classes >= MANY:
            collection.add_metrics({"accuracy_top5": MulticlassAccuracy(num_classes, average="micro", top_k=5)})
        super().__init__(collection)
        self.monitor = f"val/{metrics[0]}"
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.outputs = num_classes

    def inputs(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        return image_inputs(backbone, batch)

    def step(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """`batch` holds `pixel_values` (n, 3, h, w) and `labels` (n,) in [0, num_classes)."""
        _, labels = inputs_and_labels(batch)
        logits = self._logits(backbone, batch)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return StepOutput(loss=loss, weight=len(labels), predictions=logits, targets=labels)

    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Probabilities (n, num_classes) and the most probable label (n,)."""
        probabilities = self._logits(backbone, batch).softmax(-1)
        return {"prediction": probabilities.argmax(-1), "probabilities": probabilities}

    def _logits(self, backbone: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return logits_each(backbone(**self.inputs(backbone, batch)), self.num_classes, "class")
