"""The interface between a task and LoRAModule, and readers of batches and of backbones' outputs."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from lora_lightning.lora.errors import LoRAError

Stage = str
"""`train`, `val` or `test`, or a further set of one of the last two, such as `val_mismatched`."""


@dataclass
class StepOutput:
    """The result of one batch."""

    loss: Tensor
    """Mean over `weight` units, a scalar. Without units it is 0, with a gradient of zeros."""
    weight: float
    """Number of units (examples, tokens, or the sum of their weights) of the mean: the batch's weight in an average."""
    predictions: Tensor | None = None
    """With `targets`, the arguments of every metric's update; None where there are none, or each has its own."""
    targets: Tensor | None = None
    updates: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """The arguments of single metrics' updates, by name."""


class Task(nn.Module, ABC):
    """Loss, metrics and predictions of a task, which has no weights of the model."""

    monitor: str = "val/loss"
    """The metric that chooses the best checkpoint."""
    monitor_mode: Literal["min", "max"] = "min"
    peft_task_type: str | None = None
    """PEFT's name of this task, written to exported adapters."""
    problem_type: str | None = None
    """transformers' name of a classifier's task, written to merged models, whose pipelines choose by it softmax, a
    sigmoid for each label, or the plain number."""
    outputs: int | None = None
    """The number of outputs of the backbone's head; None where that is not one number."""
    output_is: str = "class"
    """The meaning of each output: a `number` is a target's value; for others targets are indices of outputs."""
    ignored: int | None = -100
    """The label of units without a label."""
    not_inputs: tuple[str, ...] = ("labels",)
    """Entries of a batch that are not the backbone's arguments."""
    takes_tuples: bool = False
    """Whether a batch may be (inputs, targets) in place of a mapping; `inputs` then names the first."""

    def __init__(self, metrics: MetricCollection | None = None) -> None:
        super().__init__()
        metrics = MetricCollection({}) if metrics is None else metrics
        # One set per stage: a validation in the middle of an epoch must not reset training's metrics.
        self.metrics = nn.ModuleDict({f"{s}_": metrics.clone(prefix=f"{s}/") for s in ("train", "val", "test")})
        self.losses = nn.ModuleDict({f"{s}_": MeanMetric() for s in ("train", "val", "test")})

    @abstractmethod
    def step(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """Loss, predictions and targets of one batch."""

    @abstractmethod
    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The predictions of a batch, which needs no targets, by name: tensors or lists, one row each."""

    def inputs(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The backbone's arguments by name: the batch without `not_inputs`."""
        return inputs_of(batch, *self.not_inputs)

    def examples(self, batch: Any) -> int:
        """The number of examples in a batch."""
        return examples_in(batch)

    def evaluate(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """The step of validation and test, in which some tasks also generate."""
        return self.step(backbone, batch)

    def logged(self, stage: Stage) -> list[str]:
        """Names of a stage's metrics."""
        return list(dict.fromkeys([f"{stage}/loss", *map(str, self._of_stage(stage)[1].keys(keep_base=False))]))

    def better(self, metric: str) -> str | None:
        """`min` or `max`: what is better of one of this task's metrics; None where it is not known."""
        stage, _, name = metric.partition("/")
        if name == self.monitor.partition("/")[2]:
            return self.monitor_mode
        if name == "loss":
            return "min"
        metrics = self._of_stage("train" if stage == "train" else "val")[1]
        higher = getattr(metrics[name], "higher_is_better", None) if name in metrics else None
        return None if higher is None else "max" if higher else "min"

    def wanted_outputs(self) -> int | None:
        """`outputs`, unless the user overrides `step`, which may read labels in another way."""
        return self.outputs if type(self).step.__module__.startswith("lora_lightning.") else None

    def check(self, batch: Any) -> None:
        """Refuse a label without an output in a stage's first batch; on a GPU the loss would end the process."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        count = self.wanted_outputs()
        if count is None or self.output_is == "number" or not isinstance(labels, Tensor):
            return
        none = labels[((labels < 0) | (labels >= count)) & (labels != self.ignored)]
        if none.numel():
            raise LoRAError(
                f"a batch has the label {none[0].item():g}, and the task {count}, numbered 0 to"
                f" {count - 1}: number the data's labels so, or raise num_classes and the head's outputs"
            )

    def _of_stage(self, stage: Stage) -> tuple[MeanMetric, MetricCollection]:
        loss, metrics = self.losses[f"{stage}_"], self.metrics[f"{stage}_"]
        assert isinstance(loss, MeanMetric)
        assert isinstance(metrics, MetricCollection)
        return loss, metrics

    def add_stage(self, stage: Stage) -> None:
        """Add metrics for a further set."""
        loss, metrics = self._of_stage(stage.partition("_")[0])
        self.metrics[f"{stage}_"] = metrics.clone(prefix=f"{stage}/")
        self.losses[f"{stage}_"] = copy.deepcopy(loss)
        self.reset(stage)

    def stages(self, stage: Stage) -> list[Stage]:
        """`val` or `test`, and its further sets that were added."""
        names = [key.removesuffix("_") for key in self.losses]
        return [name for name in names if name == stage or name.startswith(f"{stage}_")]

    def reset(self, stage: Stage) -> None:
        """Reset the stage's metrics, which an earlier loop may have left in the middle."""
        for metrics in self._of_stage(stage):
            metrics.reset()

    def update(self, stage: Stage, out: StepOutput) -> dict[str, Any]:
        """Add a batch to the stage's metrics and return them; the loss is weighted by units, not by batches."""
        loss, metrics = self._of_stage(stage)
        if out.weight:  # a mean over no units has no meaning
            loss.update(out.loss.detach(), out.weight)
        if out.predictions is not None:
            metrics.update(out.predictions.detach(), out.targets)
        for name, arguments in out.updates.items():
            metrics[name].update(*arguments)
        named = {f"{stage}/loss": loss, **dict(metrics.items(keep_base=False))}
        return {name: named[name] for name in self.logged(stage)}


def refuse_few(count: int | None, name: str, needs: str, hint: str = "") -> None:
    """Raise for fewer than two classes or labels, and where neither the config nor the data have their number.

    A command passes the DataModule's value, and None where it has none.
    """
    if count is None:
        raise LoRAError(
            f"how many classes are there? The data do not say ({name}): give model.task.init_args.{name}, or let the"
            f" DataModule have the attribute {name}"
        )
    if count < 2:
        raise LoRAError(f"{needs}, got {count}{hint}")


def refuse_smoothing(label_smoothing: float) -> None:
    """Raise for what is no share of the target."""
    if not 0 <= label_smoothing < 1:
        raise LoRAError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")


def inputs_of(batch: Mapping[str, Any], *targets: str) -> dict[str, Any]:
    """The batch without its targets; one that is not a mapping of names to tensors is refused."""
    if not isinstance(batch, Mapping):
        raise LoRAError(f"a batch must map names to tensors, such as input_ids and labels; got {type(batch).__name__}")
    return {key: value for key, value in batch.items() if key not in targets}


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """The batch's `labels`; a batch without them is refused."""
    inputs = inputs_of(batch, "labels")
    if "labels" not in batch:
        raise LoRAError(f"the batch has no 'labels', only {', '.join(inputs)}")
    labels: Tensor = batch["labels"]
    return labels


def logits_of(output: Any) -> Tensor:
    """Logits from a tensor, a transformers output, a mapping with `logits`, or a tuple that starts with them."""
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif isinstance(output, tuple | list) and output:
        logits = output[0]
    if isinstance(logits, Tensor):
        return logits
    keys = list(output) if isinstance(output, Mapping) else type(output).__name__
    raise LoRAError(f"the backbone must return logits (a tensor, or an output with `logits`), got {keys}")


def logits_like(output: Any, shape: Sequence[int | str], count: int, what: str) -> Tensor:
    """Logits in float32 of this shape, in which a word stands for any number; others are refused.

    Args:
        count: the number of outputs of the head that gives them.
        what: what they are one of, such as "one for each class".
    """
    logits = logits_of(output).float()
    sizes = zip(shape, logits.shape, strict=False)
    if logits.dim() != len(shape) or any(isinstance(size, int) and size != got for size, got in sizes):
        outputs, wanted = "1 output" if count == 1 else f"{count} outputs", ", ".join(map(str, shape))
        raise LoRAError(
            f"the backbone must return logits ({wanted}), {what}, got {tuple(logits.shape)}: give its head {outputs}"
        )
    return logits


PIXELS = "pixel_values"
"""The name of a batch's images (n, channels, height, width)."""


def image_inputs(backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The backbone's arguments by name: images under the name of its `forward`'s argument, which it must have."""
    inputs = inputs_of(batch, "labels")
    taken = inspect.signature(backbone.forward).parameters
    if PIXELS not in inputs or PIXELS in taken:
        return inputs
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    first = next((p.name for p in taken.values() if p.kind in named), None)
    if first is not None:
        return {first if key == PIXELS else key: value for key, value in inputs.items()}
    if any(p.kind == inspect.Parameter.VAR_KEYWORD for p in taken.values()):
        return inputs
    raise LoRAError(
        f"the forward of {type(backbone).__name__} names no argument, so images cannot be handed over by name: give it"
        " one, such as forward(self, pixel_values)"
    )


IDS, MASK = "input_ids", "attention_mask"


def examples_in(batch: Any) -> int:
    """The number of rows of the batch's first tensor; a packed row counts as one."""
    first = next(tensors_in(batch), None)
    return 0 if first is None else len(first) if first.dim() else 1


def tokens_in(batch: Any) -> Tensor | int | None:
    """The number of tokens that the backbone reads: ones of the attention mask, or all ids without a mask.

    A tensor if they are counted on the device; None if the batch has no text. Labels of encoder-decoders do not count.
    """
    if not isinstance(batch, Mapping):
        parts = [tokens_in(part) for part in batch] if isinstance(batch, list | tuple) else []
    else:
        parts = [tokens_in(part) for part in batch.values() if isinstance(part, Mapping | list | tuple)]
        for name, ids in batch.items():
            if isinstance(ids, Tensor) and name.endswith(IDS):
                mask = batch.get(f"{name.removesuffix(IDS)}{MASK}")
                parts.append(mask.sum() if isinstance(mask, Tensor) else ids.numel())
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """The tensors in mappings, lists and tuples at any depth."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from (t for part in batch.values() for t in tensors_in(part))
    elif isinstance(batch, list | tuple):
        yield from (t for part in batch for t in tensors_in(part))
