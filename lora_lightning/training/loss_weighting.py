"""Law 9 for the loss: what the optimizer sees is the mean over all units, of all micro-batches and of all processes.

A task's loss is a mean over its batch's units (examples, tokens). Lightning divides by the number N of accumulated
batches, and DDP and FSDP by the number R of processes. That gives the mean of means, in which a batch with few tokens
weighs as much as one with many. So each mean enters backward times units / c, where c keeps float16 in range, and after
the last micro-batch the accumulated gradients are multiplied by `c N R / all units`.

c is a power of two near the units of the window's first micro-batch, the same in all processes: dividing by it and
multiplying again changes no bit. An epoch's last window may have fewer micro-batches than Lightning's divisor N.

The factor is applied before gradients are unscaled, read by callbacks or clipped. With one process and no accumulation
nothing is weighed: loss and gradients are the task's.
"""

from __future__ import annotations

import math

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from lora_lightning.data.loading.sampler import EpochSampler
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.layers.functional import wide_dtype
from lora_lightning.training.strategies.collectives import reduce_number


class UnitMean:
    """The mean over the units of one optimizer step.

    Every batch's loss goes through `weigh`; after the last one's backward `finish` is called. Losses that were not
    weighed, such as those of a subclass's `training_step`, are averaged by Lightning.
    """

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        """Of the last step, over all its units; None where nothing was weighed."""
        self._share: float | None = None
        self._parts: list[tuple[Tensor, float]] = []

    def weigh(self, trainer: Trainer, loss: Tensor, units: float, batch_idx: int) -> Tensor:
        """The value to call backward on, for a `loss` that is the mean over `units`."""
        starts = batch_idx % trainer.accumulate_grad_batches == 0  # where Lightning sets gradients to zero
        self._parts = [*(() if starts else self._parts), (loss.detach(), units)]
        if not _has_parts(trainer):
            return loss
        if starts or self._share is None:
            mean = reduce_number(trainer, units, "sum") / trainer.world_size
            self._share = 2.0 ** round(math.log2(max(mean, 1.0)))
        if not units and not torch.isfinite(loss):
            raise LoRAError(
                f"a batch of no units must have a loss of 0 with gradients, so that it adds nothing, got {float(loss)}:"
                " let the task return the sum over max(units, 1)"
            )
        return loss * (units / self._share)

    def finish(self, trainer: Trainer, optimizer: Optimizer | LightningOptimizer) -> None:
        """Turn the window's accumulated gradients into those of the mean over all units."""
        self.mean = None
        if not self._parts:
            return
        units = reduce_number(trainer, sum(n for _, n in self._parts), "sum")
        if not units:
            raise LoRAError(
                "nothing is trained on: no batch of this optimizer step, in any process, has an example or token that"
                " counts in the loss; check the labels, where -100 marks what is not trained on"
            )
        if not _has_parts(trainer):
            self.mean = self._parts[-1][0]
            return
        # A batch without units adds nothing, whatever loss the task returned.
        zero = torch.zeros_like(self._parts[0][0])
        total = sum((loss.to(wide_dtype(loss)) * n for loss, n in self._parts if n), zero)
        if trainer.world_size > 1:
            total = trainer.strategy.reduce(total, reduce_op="sum")
        self.mean = total / units
        assert self._share is not None
        factor = self._share * trainer.accumulate_grad_batches * trainer.world_size / units
        if gradients := [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]:
            torch._foreach_mul_(gradients, factor)


def is_padding(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a training batch is there only so that this process has as many as the others."""
    sampler = getattr(trainer.train_dataloader, "sampler", None)
    return isinstance(sampler, EpochSampler) and sampler.is_padding(batch_idx)


def _has_parts(trainer: Trainer) -> bool:
    """Whether a step's units lie in several batches or processes."""
    return trainer.accumulate_grad_batches > 1 or trainer.world_size > 1
