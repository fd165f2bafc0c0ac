"""Successive halving of a population, which drops a member only where it is significantly worse.

After a share of the steps (a rung) all remaining members are evaluated on the same validation examples, and those
beyond the better 1 / eta are dropped (Jamieson and Talwalkar 2016, arXiv 1502.07943), each only where it is behind the
last member that stays by more than one standard error of the paired difference: in the metric or, where the metric
ties, in the loss.

The standard error is a jackknife's over G blocks of examples (Efron and Stein 1981): with d_j the difference without
block j, `se^2 = (G - 1) / G sum_j (d_j - mean d)^2`. It holds for any metric, also one that is no mean, such as F1.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DistributedSampler, IterableDataset
from torchmetrics import Metric

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import StepOutput, Task
from lora_lightning.tasks.positions import in_evaluation
from lora_lightning.training.checkpoints.resume import random_state, set_random_state
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.strategies.collectives import gather

RUNGS = ("1/8", "1/4", "1/2")
"""Shares of the steps after which members are dropped."""
BLOCKS = 20
"""Of validation batches, each left out once."""


class Halving:
    """When members are evaluated, and which are dropped then.

    Args:
        eta: at each rung at least one in `eta` of the remaining members goes on.
        rungs: shares of all steps, such as 1/8.
        metric: by which members are compared; the task's by default.
        goal: whether it should become `min` or `max`.

    Raises:
        LoRAError: eta below 2, or rungs that are no ascending shares.
    """

    def __init__(
        self, eta: int = 2, rungs: Sequence[str] = RUNGS, metric: str | None = None, goal: str | None = None
    ) -> None:
        if eta < 2:
            raise LoRAError(f"halving must be at least 2, which keeps the better half, got {eta}")
        self.eta, self.rungs, self.metric, self.goal = eta, parse_rungs(rungs), metric, goal


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A member's result at a rung."""

    value: float
    """The metric."""
    loss: float
    values: list[float]
    """The metric without each block of the validation examples."""
    losses: list[float]


def parse_rungs(texts: Sequence[str]) -> list[Fraction]:
    """Shares of all steps, which must ascend."""
    try:
        shares = [Fraction(text.strip()) for text in texts]
    except (ValueError, ZeroDivisionError):
        shares = []
    if not shares or not all(0 < share < 1 for share in shares) or shares != sorted(set(shares)):
        raise LoRAError(f"rungs must be ascending shares of the steps, such as 1/8,1/4,1/2; got {','.join(texts)}")
    return shares


def rung_steps(rungs: Sequence[Fraction], steps: float) -> list[int]:
    """The optimizer step of each rung; raises where they are unknown, or too few for distinct rungs."""
    at = [math.ceil(share * int(steps)) for share in rungs] if math.isfinite(steps) else []
    if not at or len(set(at)) < len(at) or at[-1] >= steps:
        raise LoRAError(
            f"--halving needs a step for each of the rungs {', '.join(map(str, rungs))}, and the run has {steps}: give"
            " max_epochs or max_steps, or fewer --rungs"
        )
    return at


def choose_dropped(standings: Mapping[str, Standing], keep: int, goal: str) -> dict[str, str]:
    """The members that leave at a rung where at least `keep` stay, each with a text that says how far behind it is."""
    sign = 1 if goal == "max" else -1
    lost = {name for name, reached in standings.items() if math.isnan(reached.value)}  # NaN has no place in an order
    order = sorted(standings, key=lambda name: (name in lost, -sign * standings[name].value, standings[name].loss))
    kept, last, reasons = order[keep - 1], standings[order[keep - 1]], dict[str, str]()
    for name in order[keep:]:
        candidate = standings[name]
        gap, further = last.value - candidate.value, candidate.loss - last.loss
        pairs = ((last.values, candidate.values), (last.losses, candidate.losses))
        each = [torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64) for a, b in pairs]
        error, loss_error = (math.sqrt(len(d) - 1) * float(d.std(correction=0)) for d in each)  # the jackknife's
        if name in lost and kept not in lost:
            reasons[name] = f"behind '{kept}', which has a number"
        elif gap and sign * gap > error:
            reasons[name] = f"{abs(gap):.4f} behind '{kept}' (standard error {error:.4f})"
        elif not gap and further > loss_error:
            reasons[name] = f"like '{kept}', with a loss {further:.4f} higher (standard error {loss_error:.4f})"
    return reasons


def standing(trainer: Trainer, module: LoRAModule, metric: str) -> tuple[Standing, list[StepOutput]]:
    """A member's standing on the first validation set, and its task's outputs of this process's batches there.

    The outputs are empty where each of several processes has seen all examples: Lightning validates on a share. Modes
    and random states are restored, and the task's metrics do not change.
    """
    loaders: Any = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
    loader = next(iter(loaders), None) if isinstance(loaders, list) else loaders
    if loader is None:
        raise LoRAError(
            "halving compares members on the validation set, and the data have none: give data.split a share"
        )
    task = copy.deepcopy(module.task)
    task.reset("val")  # a task that generates texts reads which stage began last
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
    task.cpu()
    for part in task.modules():
        if isinstance(part, Metric):  # summed in float64, without a reduction over processes
            part.sync_on_compute = False
            part.set_dtype(torch.float64)
    value, loss = _figures(task, metric, blocks)
    without = [_figures(task, metric, [*blocks[:number], *blocks[number + 1 :]]) for number in range(len(blocks))]
    reached = Standing(value=value, loss=loss, values=[v for v, _ in without], losses=[x for _, x in without])
    return reached, outputs if divided or trainer.world_size == 1 else []


@torch.no_grad()
def _outputs(trainer: Trainer, module: LoRAModule, task: Task, loader: Any) -> list[StepOutput]:
    """The task's output of each batch, on the CPU; as in Lightning's validation, with its share of the batches."""
    before, limit, outputs = random_state(), trainer.limit_val_batches, []
    count = limit if isinstance(limit, int) else None if limit == 1.0 else int(len(loader) * limit)
    with in_evaluation(module):
        for read in islice(loader, count):
            batch = trainer.strategy.batch_to_device(read, module.device)
            with trainer.precision_plugin.val_step_context():
                outputs.append(move_data_to_device(task.evaluate(module.backbone, batch), "cpu"))
    set_random_state(before)
    return outputs


def _figures(task: Task, metric: str, blocks: Sequence[Sequence[StepOutput]]) -> tuple[float, float]:
    """The metric and the loss of some blocks, computed by the task as in a validation."""
    task.reset("val")
    metrics: dict[str, Any] = {}
    for out in chain.from_iterable(blocks):
        metrics = task.update("val", out)
    value = float(metrics[metric].compute())
    return value, float(metrics["val/loss"].compute()) if "val/loss" in metrics else value


def replay(module: LoRAModule, outputs: Sequence[StepOutput]) -> None:
    """Reuse a rung's outputs in the validation with which Lightning ends a dropped member's fit.

    A pass over the validation set can cost as much as the steps to the first rung. Where the weights have changed
    since, as with a callback that validates their average, the model is evaluated as always.
    """
    task, remaining, weights = module.task, deque(outputs), _sums(module)

    def evaluate(backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        if remaining and _sums(module) == weights:
            return move_data_to_device(remaining.popleft(), module.device)  # type: ignore[no-any-return]
        remaining.clear()
        return type(task).evaluate(task, backbone, batch)

    task.evaluate = evaluate  # type: ignore[method-assign]


def _sums(module: LoRAModule) -> list[float]:
    return [float(p.detach().double().sum()) for p in module.parameters() if p.requires_grad]
