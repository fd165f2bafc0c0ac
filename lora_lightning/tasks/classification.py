"""One label, any number of labels, or a number for each text, pair of texts or image."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MultilabelExactMatch,
    MultilabelF1Score,
)

from lora_lightning.lora.errors import LoRAError, refuse_unknown
from lora_lightning.tasks.base import (
    StepOutput,
    Task,
    image_inputs,
    labels_of,
    logits_like,
    logits_of,
    refuse_few,
    refuse_smoothing,
)

TOP5_FROM = 10
"""From this number of classes on, top-5 accuracy is logged."""


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
    """The named metrics under their names; no name, an unknown one and one for two classes of more are refused."""
    if not names:
        raise LoRAError(f"metrics: name at least one of {', '.join(METRICS)}: the first chooses the best checkpoint")
    for name in names:
        refuse_unknown("each of metrics", name, METRICS)
    if "binary_f1" in names and num_classes != 2:
        raise LoRAError(f"metrics: binary_f1 is the F1 of class 1 of 2, and there are {num_classes} classes: take f1")
    # Without groups: torchmetrics merges metrics whose states are equal after one batch, which may be by chance.
    return MetricCollection({name: METRICS[name](num_classes) for name in names}, compute_groups=False)


class Classification(Task):
    """The base of classifications: the backbone's logits (n, num_classes)."""

    monitor_mode = "max"
    ignored = None

    def __init__(self, num_classes: int, metrics: MetricCollection) -> None:
        super().__init__(metrics)
        self.num_classes = self.outputs = num_classes

    def logits(self, backbone: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Logits (n, num_classes) in float32."""
        output, count = backbone(**self.inputs(backbone, batch)), self.num_classes
        return logits_like(output, ("n", count), count, f"one for each {self.output_is}")


class OneLabel(Classification):
    """Cross-entropy over `num_classes` logits, two for a binary task.

    Args:
        num_classes: number of labels. The data's by default.
        label_smoothing: share of the target spread over all classes.
        metrics: some of `accuracy` over examples, `f1` (the mean over classes), `binary_f1` (of class 1 of two, GLUE's
            for MRPC and QQP) and `matthews` (Matthews' correlation, GLUE's for CoLA). The first chooses the best
            checkpoint.

    Raises:
        LoRAError: fewer than two classes, an unknown metric, or an invalid share.
    """

    tells_top5 = False

    def __init__(
        self, num_classes: int, label_smoothing: float = 0.0, metrics: Sequence[str] = ("accuracy", "f1")
    ) -> None:
        hint = ": are the labels in data.label_column, or name them all as data.label_names"
        refuse_few(num_classes, "num_classes", "classification needs at least 2 classes", hint)
        refuse_smoothing(label_smoothing)
        collection = metrics_of(metrics, num_classes)
        if self.tells_top5 and num_classes >= TOP5_FROM:
            collection.add_metrics({"accuracy_top5": MulticlassAccuracy(num_classes, average="micro", top_k=5)})
        super().__init__(num_classes, collection)
        self.monitor = f"val/{metrics[0]}"
        self.label_smoothing = label_smoothing

    def step(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """`batch` has the backbone's arguments and `labels` (n,) in [0, num_classes)."""
        labels = labels_of(batch)
        logits = self.logits(backbone, batch)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return StepOutput(loss=loss, weight=len(labels), predictions=logits, targets=labels)

    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Probabilities (n, num_classes) and the most probable label (n,)."""
        probabilities = self.logits(backbone, batch).softmax(-1)
        return {"prediction": probabilities.argmax(-1), "probabilities": probabilities}


class SequenceClassification(OneLabel):
    """Cross-entropy over `num_classes` logits of a text or a pair of texts, two for a binary task."""

    peft_task_type = "SEQ_CLS"
    problem_type = "single_label_classification"


class ImageClassification(OneLabel):
    """Cross-entropy over `num_classes` logits of an image.

    The backbone takes `pixel_values` (n, 3, h, w) by that name, as transformers' models do, or as its first argument,
    as those of timm and torchvision do. From 10 classes on `accuracy_top5` is logged too: the share of images whose
    label is among the five most probable.
    """

    tells_top5 = True

    def inputs(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        return image_inputs(backbone, batch)


class MultiLabelClassification(Classification):
    """Binary cross-entropy of each label, with F1 over all decisions (micro) and as the mean over labels (macro).

    For logits z and targets t in {0, 1}, `-t log sigmoid(z) - (1 - t) log sigmoid(-z)`, the mean over examples.
    `subset_accuracy` is the share of examples whose labels are all right.

    Args:
        num_classes: number of labels. The data's by default.
        threshold: a label is predicted where its probability is above this.
        over_labels: whether an example's loss is the `mean` or the `sum` over its labels.

    Raises:
        LoRAError: fewer than two labels, or a threshold that is no probability.
    """

    monitor = "val/micro_f1"
    peft_task_type = "SEQ_CLS"
    problem_type = "multi_label_classification"
    output_is = "label"

    def __init__(self, num_classes: int, threshold: float = 0.5, over_labels: Literal["mean", "sum"] = "mean") -> None:
        needs = "multi-label classification needs at least 2 labels"
        refuse_few(num_classes, "num_classes", needs, ": take one of two classes")
        if not 0 < threshold < 1:
            raise LoRAError(f"threshold must be a probability above 0 and below 1, got {threshold}")
        refuse_unknown("over_labels", over_labels, ("mean", "sum"))
        metrics = {
            "micro_f1": MultilabelF1Score(num_classes, average="micro"),
            "macro_f1": MultilabelF1Score(num_classes, average="macro"),
            "subset_accuracy": MultilabelExactMatch(num_classes),
        }
        super().__init__(num_classes, MetricCollection(dict(metrics)))
        self.threshold, self.over_labels = threshold, over_labels

    def step(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """`batch` has the backbone's keyword arguments and `labels` (n, num_classes), each 0 or 1."""
        labels = labels_of(batch)
        logits = self.logits(backbone, batch)
        if labels.shape != logits.shape:
            raise LoRAError(f"labels must be {tuple(logits.shape)}, a 0 or 1 for each label, got {tuple(labels.shape)}")
        loss = F.binary_cross_entropy_with_logits(logits, labels.float())
        loss = loss * self.num_classes if self.over_labels == "sum" else loss
        chosen = (logits.sigmoid() > self.threshold).int()
        return StepOutput(loss=loss, weight=len(labels), predictions=chosen, targets=labels.int())

    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The numbers of each example's labels, a tensor for each example, and probabilities (n, num_classes)."""
        probabilities = self.logits(backbone, batch).sigmoid()
        numbers = [row.nonzero().flatten() for row in probabilities > self.threshold]
        return {"prediction": numbers, "probabilities": probabilities}


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
        target = labels_of(batch).float()
        predicted = self.numbers(backbone, batch)
        if predicted.shape != target.shape:
            raise LoRAError(
                f"labels must be one number for each example, {tuple(predicted.shape)}, got {tuple(target.shape)}"
            )
        loss = F.mse_loss(predicted, target)
        return StepOutput(loss=loss, weight=len(target), predictions=predicted, targets=target)

    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """A number for each example, (n,)."""
        return {"prediction": self.numbers(backbone, batch)}

    def numbers(self, backbone: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Predicted numbers (n,) in float32."""
        logits = logits_of(backbone(**self.inputs(backbone, batch)))
        return logits_like(logits.unsqueeze(1) if logits.dim() == 1 else logits, ("n", 1), 1, "a number each").flatten()
