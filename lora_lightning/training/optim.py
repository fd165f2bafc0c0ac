"""Optimizers' parameter groups and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import Task


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters of `model` in groups: matrices and A, B, and vectors without weight decay.

    Vectors are biases, norms' weights and DoRA's magnitudes, whose size is no sign of overfitting. Groups carry a
    `name`: matrices, B or vectors; empty ones are left out.
    """
    groups: dict[str, dict[str, Any]] = {name: {"params": [], "name": name} for name in ("matrices", "B", "vectors")}
    groups["vectors"]["weight_decay"] = 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_b = name.rpartition(".")[2] == "lora_B"
            groups["B" if is_b else "vectors" if parameter.dim() < 2 else "matrices"]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def make_optimizer(
    model: nn.Module, optimizer: Callable[[list[dict[str, Any]]], Optimizer], b_lr_ratio: float = 1.0
) -> Optimizer:
    """An optimizer over exactly what trains in `model`, with B's learning rate `b_lr_ratio` times the others'.

    LoRA+ (Hayou et al. 2024, arXiv 2402.12354): A and B should not learn at one rate; B's should be larger, about
    16 times in the paper's runs.

    Args:
        optimizer: called with `parameter_groups`; the rate that it gives is A's.
    """
    if not b_lr_ratio > 0 or math.isinf(b_lr_ratio):
        raise LoRAError(f"b_lr_ratio must be a number above 0 (LoRA+ takes about 16), got {b_lr_ratio}")
    result = optimizer(parameter_groups(model))
    if b_lr_ratio == 1:
        return result  # also one that sets its rates itself, as transformers' Adafactor with relative_step
    for group in (group for group in result.param_groups if group.get("name") == "B"):
        if group["lr"] is None:
            raise LoRAError(
                f"b_lr_ratio={b_lr_ratio} multiplies B's learning rate, and {type(result).__name__} sets its rates"
                " itself: give it lr, or leave b_lr_ratio at 1"
            )
        group["lr"] = group["lr"] * b_lr_ratio  # not in place: groups may share a tensor
    return result


def schedule_entry(
    scheduler: LRScheduler | ReduceLROnPlateau,
    interval: str,
    task: Task,
    count_steps: Callable[[], float],
    b_lr_ratio: float = 1.0,
) -> dict[str, Any]:
    """Lightning's entry for a schedule: when it steps, and what it monitors.

    Args:
        count_steps: returns the optimizer steps of the whole fit; called for `WarmupDecay` alone.
    """
    if b_lr_ratio != 1:
        starts = {group.get("name"): float(group.get("initial_lr", 0)) for group in scheduler.optimizer.param_groups}
        if starts.get("B") and starts["B"] == starts.get("matrices"):
            raise LoRAError(
                f"b_lr_ratio={b_lr_ratio} is undone by {type(scheduler).__name__}, which sets one rate for A and B:"
                " give it a rate for each group, or take WarmupDecay"
            )
    entry: dict[str, Any] = {"scheduler": scheduler, "interval": interval}
    if isinstance(scheduler, WarmupDecay):
        entry["interval"] = "step"
        if scheduler.total_steps is None:
            steps = count_steps()
            if steps == float("inf"):
                raise LoRAError("WarmupDecay decays over max_epochs or max_steps: give one, or its total_steps")
            scheduler.total_steps = int(steps)
        warm = scheduler.warmup_steps(scheduler.total_steps)
        if warm >= scheduler.total_steps:
            rank_zero_warn(
                f"the warm-up takes {warm} steps and the run has {scheduler.total_steps}, so that the learning rate"
                " never gets where it is to go: give warmup a share, such as 0.06"
            )
    elif isinstance(scheduler, ReduceLROnPlateau):
        # torch's default mode is min, which suits the loss.
        fits = task.monitor if scheduler.mode == task.monitor_mode else "val/loss"
        entry |= {"monitor": getattr(scheduler, "monitor", None) or fits, "interval": "epoch"}
    return entry


class WarmupDecay(LambdaLR):
    """Linear warm-up, then linear or cosine decay to zero, or none; stepped once per optimizer step.

    `LoRAModule` sets the number of steps from the trainer.

    Args:
        optimizer: whose learning rates are scaled.
        warmup: steps (a whole number of at least 1) or a share of all steps (below 1). The paper's runs use 0.06.
        decay: shape after the warm-up.
        total_steps: for use without `LoRAModule`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: float = 0.06,
        decay: Literal["linear", "cosine", "constant"] = "linear",
        total_steps: int | None = None,
    ) -> None:
        if warmup < 0 or (warmup >= 1 and not float(warmup).is_integer()):
            raise LoRAError(f"warmup must be a share below 1 or a whole number of steps, got {warmup}")
        self.warmup, self.decay, self.total_steps = warmup, decay, total_steps
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """The factor on the base learning rate at optimizer step `step`, counted from 0."""
        if self.total_steps is None:
            # Called by the constructor, before the number of steps can be known.
            return 1.0 if self.warmup == 0 else 0.0
        warm = self.warmup_steps(self.total_steps)
        if step < warm:
            return step / warm
        if self.decay == "constant":
            return 1.0
        done = min(1.0, (step - warm) / max(1, self.total_steps - warm))
        return 1.0 - done if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    def state_dict(self) -> dict[str, Any]:
        """Without the number of steps, which may differ in a resumed run."""
        return {key: value for key, value in super().state_dict().items() if key != "total_steps"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the saved step, on this run's curve."""
        super().load_state_dict(state_dict)
        if self.total_steps is not None:
            self._last_lr = [base * self.factor(self.last_epoch) for base in self.base_lrs]
            for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
                group["lr"] = rate

    def warmup_steps(self, total_steps: int) -> int:
        """Length of the warm-up in steps."""
        return math.ceil(self.warmup * total_steps) if self.warmup < 1 else int(self.warmup)
