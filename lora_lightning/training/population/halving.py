"""Which members of a population go on: successive halving that drops only what it can tell apart.

After a share of the steps (a rung) all members that are left are evaluated on the same validation examples, and those
beyond the better 1 / eta are dropped (Jamieson and Talwalkar 2016, arXiv 1502.07943), each only where it is behind the
last one kept by more than one standard error of the paired difference: in the metric or, where the metric ties, in the
loss.

The standard error is a jackknife's over G blocks of examples (Efron and Stein 1981): with d_j the difference without
block j, `se^2 = (G - 1) / G sum_j (d_j - mean d)^2`. It holds for any metric, also one that is no mean, such as F1.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, IterableDataset
from torchmetrics import Metric

from lora_lightning.lora.errors import LoRAError, did_you_mean
from lora_lightning.tasks.base import StepOutput, Task
from lora_lightning.training.checkpoints.rng_state import random_state, set_random_state
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.strategies.collectives import gather

RUNGS = ("1/8", "1/4", "1/2")
"""Shares of the steps after which members are dropped."""
BLOCKS = 20
"""Of validation batches, each left out once."""


class Halving:
    """When members are evaluated, and who is dropped then.

    Args:
        eta: of the members that are left, at least one in `eta` goes on at each rung.
        rungs: shares of all steps, such as 1/8.
        metric: by which members are compared; that of the task by default.
        goal: whether it should become `min` or `max`.

    Raises:
        LoRAError: numbers that mean nothing.
    """

    def __init__(
        self, eta: int = 2, rungs: Sequence[str] = RUNGS, metric: str | None = None, goal: str | None = None
    ) -> None:
        if eta < 2:
            raise LoRAError(f"halving must be at least 2, which keeps the better half, got {eta}")
        self.eta, self.rungs, self.metric, self.goal = eta, parse_rungs(rungs), metric, goal


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a member came to at a rung."""

    value: float
    """The metric."""
    loss: float
    values: list[float]
    """The metric without each block of the validation examples."""
    losses: list[float]


def parse_rungs(texts: Sequence[str]) -> list[Fraction]:
    """Shares of all steps, ascending.

    Raises:
        LoRAError: one is no share, or they do not ascend.
    """
    try:
        shares = [Fraction(text.strip()) for text in texts]
    except (ValueError, ZeroDivisionError):
        shares = []
    if not shares or not all(0 < share < 1 for share in shares) or shares != sorted(set(shares)):
        raise LoRAError(f"rungs must be ascending shares of the steps, such as 1/8,1/4,1/2; got {','.join(texts)}")
    return shares


def rung_steps(rungs: Sequence[Fraction], steps: float) -> list[int]:
    """After which optimizer step each rung is.

    Raises:
        LoRAError: the number of steps is not known, or too small to tell the rungs apart.
    """
    at = [math.ceil(share * int(steps)) for share in rungs] if math.isfinite(steps) else []
    if not at or len(set(at)) < len(at) or at[-1] >= steps:
        raise LoRAError(
            f"--halving needs a step for each of the rungs {', '.join(map(str, rungs))}, and the run has {steps}: give"
            " max_epochs or max_steps, or fewer --rungs"
        )
    return at


def dropped(standings: Mapping[str, Standing], keep: int, goal: str) -> dict[str, str]:
    """Who leaves at a rung, and how far behind, among the members that are left.

    Args:
        keep: how many stay at least.
        goal: whether the metric should become `max` or `min`.
    """
    sign = 1 if goal == "max" else -1
    order = sorted(standings, key=lambda name: (-sign * standings[name].value, standings[name].loss))
    reasons: dict[str, str] = {}
    if keep >= len(order):
        return reasons
    last = standings[order[keep - 1]]
    for name in order[keep:]:
        member = standings[name]
        gap, error = _paired(last.value, member.value, last.values, member.values)
        if gap and sign * gap > error:
            reasons[name] = f"{abs(gap):.4f} behind '{order[keep - 1]}' (standard error {error:.4f})"
        elif not gap:
            gap, error = _paired(member.loss, last.loss, member.losses, last.losses)
            if gap > error:
                reasons[name] = f"like '{order[keep - 1]}', with a loss {gap:.4f} higher (standard error {error:.4f})"
    return reasons


def _paired(a: float, b: float, without_a: Sequence[float], without_b: Sequence[float]) -> tuple[float, float]:
    """`a - b`, and its jackknife standard error."""
    each = [x - y for x, y in zip(without_a, without_b, strict=True)]
    mean, count = sum(each) / len(each), len(each)
    return a - b, math.sqrt((count - 1) / count * sum((d - mean) ** 2 for d in each))


def refuse_metric(module: LoRAModule, metric: str) -> None:
    """Raise where a metric cannot be found anew of the validation set's outputs."""
    known = module.task.logged("val")
    if metric not in known:
        raise LoRAError(
            f"--halving goes by a figure of the task: {', '.join(known)}; got {metric}{did_you_mean(metric, known)}"
        )


def standing(trainer: Trainer, module: LoRAModule, metric: str) -> tuple[Standing, list[StepOutput]]:
    """Where a member stands on the first validation set, and what its task made of this process's batches there.

    The latter is empty where each of several processes has seen all examples: Lightning validates on its share. The fit
    keeps no trace: modes and random states are put back, and the task's own metrics count nothing.

    Raises:
        LoRAError: there is no validation set, or too small a one for a standard error.
    """
    loaders: Any = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
    if isinstance(loaders, list) and not loaders:
        raise LoRAError(
            "halving compares members on the validation set, and the data have none: give data.split a share"
        )
    loader = loaders[0] if isinstance(loaders, list) else loaders
    task = copy.deepcopy(module.task)
    task.reset("val")  # a task that writes texts asks which stage began last
    outputs = _outputs(trainer, module, task, loader)
    blocks = [outputs[first::BLOCKS] for first in range(BLOCKS)]
    # Where nothing divides the examples among the processes, each has seen them all.
    sampler, data = getattr(loader, "sampler", None), getattr(loader, "dataset", None)
    divided = isinstance(sampler, DistributedSampler) or isinstance(data, IterableDataset)
    shares = gather(blocks) if divided else [blocks]
    blocks = [block for share in shares for block in share if any(out.weight for out in block)]
    if len(blocks) < 2:
        raise LoRAError(
            "--halving compares members on blocks of validation batches, and there are fewer than two: a smaller"
            " data.init_args.eval_batch_size"
        )
    _count_exactly(task)
    value, loss = _figures(task, metric, blocks)
    without = [_figures(task, metric, [*blocks[:number], *blocks[number + 1 :]]) for number in range(len(blocks))]
    reached = Standing(value=value, loss=loss, values=[v for v, _ in without], losses=[x for _, x in without])
    return reached, outputs if divided or trainer.world_size == 1 else []


@torch.no_grad()
def _outputs(trainer: Trainer, module: LoRAModule, task: Task, loader: Iterable[Any]) -> list[StepOutput]:
    """Of each batch, on the CPU."""
    before, modes = random_state(), [(inner, inner.training) for inner in module.modules()]
    module.eval()
    limit = trainer.limit_val_batches
    outputs = []
    try:
        for read in islice(loader, limit) if isinstance(limit, int) else loader:
            batch = trainer.strategy.batch_to_device(read, module.device)
            with trainer.precision_plugin.val_step_context():
                outputs.append(_on_device(task.evaluate(module.backbone, batch), torch.device("cpu")))
    finally:
        for inner, mode in modes:
            inner.training = mode
        set_random_state(before)
    return outputs


def _on_device(out: StepOutput, device: torch.device) -> StepOutput:
    tensors: dict[str, Any] = {
        name: value.detach().to(device) for name, value in vars(out).items() if isinstance(value, Tensor)
    }
    return dataclasses.replace(out, **tensors)


def _count_exactly(task: Task) -> None:
    """Let a task count in float64, where the batches of all processes are."""
    task.cpu()
    for metric in task.modules():
        if isinstance(metric, Metric):
            metric.sync_on_compute = False
            metric.set_dtype(torch.float64)


def _figures(task: Task, metric: str, blocks: Sequence[Sequence[StepOutput]]) -> tuple[float, float]:
    """The metric and the loss of some blocks, counted by the task as in a validation."""
    task.reset("val")
    metrics: dict[str, Any] = {}
    for out in chain.from_iterable(blocks):
        metrics = task.update("val", out)
    value = float(metrics[metric].compute())
    return value, float(metrics["val/loss"].compute()) if "val/loss" in metrics else value


def replay(module: LoRAModule, outputs: Sequence[StepOutput]) -> None:
    """Let the validation with which Lightning ends a dropped member's fit count what its rung has just computed.

    A pass over the validation set can cost as much as the steps to the first rung. Where something has moved the
    weights since, such as a callback that validates their average, the model is evaluated as always.
    """
    task, left, weights = module.task, deque(outputs), _sums(module)

    def evaluate(backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        if left and _sums(module) == weights:
            return _on_device(left.popleft(), module.device)
        left.clear()
        return type(task).evaluate(task, backbone, batch)

    task.evaluate = evaluate  # type: ignore[method-assign]


def _sums(module: LoRAModule) -> list[float]:
    return [float(parameter.detach().double().sum()) for parameter in module.parameters() if parameter.requires_grad]
