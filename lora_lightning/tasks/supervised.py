"""The generic task: any module, any loss and any metrics, each named by its class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lora_lightning.lora.errors import LoRAError, did_you_mean, refuse_unknown
from lora_lightning.tasks.base import StepOutput, Task


class Supervised(Task):
    """`loss(backbone(inputs), target)`, and torchmetrics of the same two.

    A batch is a mapping, with the target under `target` and the backbone's arguments under the other names, or a tuple
    (inputs, target). The backbone returns a tensor, or a mapping with the entry `output`.

    The loss is a mean over examples, by whose number batches are weighed. A loss with `reduction: sum` is divided by
    it. One with `reduction: none` is averaged over all its values, by whose number batches are weighed then: this is
    right also where examples have different numbers of values. torch's `CrossEntropyLoss` and `NLLLoss` of labels are
    means over the labels y that are not `ignore_index`, each with `weight[y]`: batches are weighed by these sums.

    Args:
        loss: called with (outputs, target).
        metrics: by the name under which each is logged; each is updated with (outputs, target).
        target: the name of the target in the batch.
        inputs: names of the backbone's arguments in the batch; all but the target by default.
        output: the entry of the backbone's output, where that is a mapping.
        prediction: applied to the outputs for `predict`, such as `torch.nn.Softmax`; nothing by default.
        monitor: the metric that chooses the best checkpoint: `loss`, or a name in `metrics`.
        monitor_mode: whether the best is the smallest or the largest; the metric's by default.

    Raises:
        LoRAError: a batch without its target, a wrong output, shapes that would be broadcast silently.
    """

    takes_tuples = True

    def __init__(
        self,
        loss: nn.Module,
        metrics: dict[str, Metric] | None = None,
        target: str = "labels",
        inputs: list[str] | None = None,
        output: str = "logits",
        prediction: nn.Module | None = None,
        monitor: str = "loss",
        monitor_mode: Literal["min", "max"] | None = None,
    ) -> None:
        metrics_by_name: dict[str, Any] = dict(metrics or {})
        if "loss" in metrics_by_name:
            raise LoRAError("metrics: 'loss' is logged anyway, name this one otherwise")
        refuse_unknown("monitor", monitor, ["loss", *metrics_by_name])
        # In groups, metrics with equal states after the first batch would be merged.
        super().__init__(MetricCollection(metrics_by_name, compute_groups=False))
        self.loss, self.prediction = loss, prediction
        self.target, self.input_names, self.output = target, inputs, output
        self.monitor = f"val/{monitor}"
        higher = getattr(metrics_by_name.get(monitor), "higher_is_better", None)
        self.monitor_mode = monitor_mode or ("max" if higher else "min")

    def inputs(self, backbone: nn.Module, batch: Any) -> dict[str, Any]:
        """The backbone's arguments by name; of a tuple they take the names of its first parameters."""
        inputs, _ = self._parts(batch)
        if isinstance(inputs, Mapping):
            return dict(inputs)
        values = inputs if isinstance(inputs, tuple | list) else (inputs,)
        return dict(zip(inspect.signature(backbone.forward).parameters, values, strict=False))

    def step(self, backbone: nn.Module, batch: Any) -> StepOutput:
        """`batch` maps names to tensors, one of them the target; or it is (inputs, target)."""
        inputs, target = self._parts(batch)
        if target is None:
            raise LoRAError(f"the batch has no target '{self.target}'{_near(self.target, batch)}")
        outputs = self._outputs(backbone, inputs)
        target = _fit_target(outputs, target)
        loss, weight = self._mean(self.loss(outputs, target), outputs, target)
        return StepOutput(loss=loss, weight=weight, predictions=outputs, targets=target)

    def predict(self, backbone: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The outputs (n, ...), after `prediction` if there is one."""
        outputs = self._outputs(backbone, self._parts(batch)[0])
        return {"prediction": outputs if self.prediction is None else self.prediction(outputs)}

    def _parts(self, batch: Any) -> tuple[Any, Any]:
        """The backbone's inputs, and the target or None."""
        if isinstance(batch, Mapping):
            names = [name for name in batch if name != self.target] if self.input_names is None else self.input_names
            for name in names:
                if name not in batch:
                    raise LoRAError(f"the batch has no '{name}', which inputs names{_near(name, batch)}")
            return {name: batch[name] for name in names}, batch.get(self.target)
        if isinstance(batch, Tensor):
            return batch, None
        if not isinstance(batch, Sequence) or not 1 <= len(batch) <= 2:
            got = f"{type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, Sequence) else "")
            raise LoRAError(f"a batch must map names to tensors or be (inputs, target), got a {got}")
        return batch[0], batch[1] if len(batch) == 2 else None

    def _outputs(self, backbone: nn.Module, inputs: Any) -> Tensor:
        several = isinstance(inputs, tuple | list)
        made: Any = backbone(**inputs) if isinstance(inputs, Mapping) else backbone(*inputs if several else [inputs])
        if isinstance(made, Mapping):
            if self.output not in made:
                raise LoRAError(f"the backbone returns no '{self.output}'{_near(self.output, made)}: name its output")
            made = made[self.output]
        if not isinstance(made, Tensor):
            raise LoRAError(
                f"the backbone must return a tensor, or a mapping with its output, got {type(made).__name__}"
            )
        return made

    def _mean(self, value: Any, outputs: Tensor, target: Tensor) -> tuple[Tensor, float]:
        """The mean, and the units that it is over."""
        if not isinstance(value, Tensor):
            raise LoRAError(f"{type(self.loss).__name__} must return a tensor, got {type(value).__name__}")
        if value.dim():
            return value.sum() / max(value.numel(), 1), value.numel()
        n = len(target)
        if getattr(self.loss, "reduction", None) == "sum":
            return value / max(n, 1), n
        if not isinstance(self.loss, nn.CrossEntropyLoss | nn.NLLLoss) or target.is_floating_point():
            return value, n
        counted = target[target != self.loss.ignore_index]
        units = counted.numel() if self.loss.weight is None else float(self.loss.weight[counted].sum())
        return (value if units else outputs.sum() * 0), units


def _fit_target(outputs: Tensor, value: Any) -> Tensor:
    """A target of one number for each output in the outputs' shape: (n,) beside (n, 1) would be broadcast.

    Numbers with a point get the outputs' dtype; whole ones, which may be counts or classes, keep theirs.
    """
    target: Tensor = torch.as_tensor(value).to(outputs.device)
    if target.squeeze().shape == outputs.squeeze().shape:
        target = target.reshape(outputs.shape)
    elif target.is_floating_point():
        raise LoRAError(
            f"a target of numbers must have the outputs' shape {tuple(outputs.shape)}, got {tuple(target.shape)}"
        )
    return target.to(outputs) if target.is_floating_point() else target


def _near(name: str, held: Any) -> str:
    names = [str(key) for key in held] if isinstance(held, Mapping) else []
    return f"{did_you_mean(name, names)} (it has {', '.join(names)})" if names else ""
