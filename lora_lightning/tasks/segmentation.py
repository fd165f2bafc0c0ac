"""One label for each pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import (
    PIXELS,
    StepOutput,
    Task,
    image_inputs,
    labels_of,
    logits_like,
    refuse_few,
)

IGNORED = 255
"""The value of pixels without a label, as in Pascal VOC, Cityscapes and ADE20K."""


class ImageSegmentation(Task):
    """Cross-entropy over the labeled pixels; mean IoU over classes and accuracy over pixels.

    Mean IoU is (1/C) sum_c TP_c / (TP_c + FP_c + FN_c) with counts summed over the whole set, over the C classes that
    occur in it or in its predictions (Everingham et al. 2010, section 4.1.3). Logits of a coarser grid are upsampled
    bilinearly to the mask's size, as in SegFormer's and torchvision's losses.

    Args:
        num_classes: number of labels. The data's by default.
        ignore_index: value of pixels without a label.
    """

    monitor = "val/miou"
    monitor_mode = "max"

    def __init__(self, num_classes: int, ignore_index: int = IGNORED) -> None:
        refuse_few(num_classes, "num_classes", "segmentation needs at least 2 classes")
        if 0 <= ignore_index < num_classes:
            raise LoRAError(f"ignore_index must not be one of the labels 0 to {num_classes - 1}, got {ignore_index}")
        metrics = {
            "miou": MulticlassJaccardIndex(num_classes, average="macro", ignore_index=ignore_index),
            "pixel_accuracy": MulticlassAccuracy(num_classes, average="micro", ignore_index=ignore_index),
        }
        super().__init__(MetricCollection(dict(metrics), compute_groups=False))
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.outputs, self.ignored = num_classes, ignore_index

    def inputs(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        return image_inputs(backbone, batch)

    def step(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """`batch` has `pixel_values` (n, 3, h, w) and `labels` (n, h', w'), integers or `ignore_index`."""
        labels = labels_of(batch)
        if labels.dim() != 3:
            raise LoRAError(f"labels must be masks (n, height, width), got {tuple(labels.shape)}")
        logits = self._logits(backbone, batch, (int(labels.shape[1]), int(labels.shape[2])))
        weight = int((labels != self.ignore_index).sum())
        loss = F.cross_entropy(logits, labels.long(), ignore_index=self.ignore_index, reduction="sum")
        return StepOutput(
            loss=loss / max(weight, 1), weight=weight, predictions=logits.argmax(1), targets=labels.long()
        )

    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The most probable label of each pixel (n, h, w)."""
        height, width = batch[PIXELS].shape[-2:]
        return {"prediction": self._logits(backbone, batch, (height, width)).argmax(1)}

    def _logits(self, backbone: nn.Module, batch: Mapping[str, Any], size: tuple[int, int]) -> Tensor:
        """Logits (n, num_classes, *size) in float32."""
        output = backbone(**self.inputs(backbone, batch))
        if isinstance(output, Mapping) and isinstance(output.get("out"), Tensor):  # torchvision's
            output = output["out"]
        count = self.num_classes
        logits = logits_like(output, ("n", count, "height", "width"), count, "one map for each class")
        if tuple(logits.shape[-2:]) != size:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits
