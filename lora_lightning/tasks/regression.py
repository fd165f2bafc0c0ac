"""One number for each text or pair of texts: the similarity of two sentences, a score, a rating."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection, PearsonCorrCoef, SpearmanCorrCoef

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import StepOutput, Task, inputs_and_labels, inputs_of, logits_of


class SequenceRegression(Task):
    """The mean of `(y - target)^2` over examples, y the head's one output; Pearson's and Spearman's correlation.

    Both correlations are GLUE's for STS-B; Pearson's chooses the best checkpoint. Targets are not scaled; scaled ones
    may train faster where their mean is far from 0.
    """

    monitor = "val/pearson"
    monitor_mode = "max"
    peft_task_type = "SEQ_CLS"
    problem_type = "regression"
    outputs = 1
    output_is = "number"

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ranks need all numbers in memory: eight bytes for each example
            spearman = SpearmanCorrCoef()
        super().__init__(MetricCollection({"pearson": PearsonCorrCoef(), "spearman": spearman}))

    def step(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """`batch` has the backbone's keyword arguments and `labels` (n,), numbers."""
        inputs, labels = inputs_and_labels(batch)
        predicted, target = _numbers(backbone, inputs), labels.float()
        if predicted.shape != target.shape:
            raise LoRAError(
                f"labels must be one number for each example, {tuple(predicted.shape)}, got {tuple(target.shape)}"
            )
        loss = F.mse_loss(predicted, target)
        return StepOutput(loss=loss, weight=len(labels), predictions=predicted, targets=target)

    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """A number for each example, (n,)."""
        return {"prediction": _numbers(backbone, inputs_of(batch, "labels"))}


def _numbers(backbone: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Predicted numbers (n,) in float32."""
    logits = logits_of(backbone(**inputs)).float()
    if logits.dim() == 2 and logits.shape[1] == 1:
        logits = logits.squeeze(1)
    if logits.dim() != 1:
        raise LoRAError(
            f"the backbone must return (n, 1), a number each, got {tuple(logits.shape)}: give its head 1 output"
        )
    return logits
