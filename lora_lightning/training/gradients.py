"""Whose gradients an optimizer steps on: each parameter's own, or, where several processes share the work, parts.

DDP and FSDP2 leave a gradient in `.grad` of the parameter that it belongs to. DeepSpeed takes it away, adds it up over
the processes and gives each of them a stretch of all gradients laid in a row. What looks at gradients, or scales them,
asks here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class SharedStep(ABC):
    """A strategy whose processes each hold and step a part of what trains."""

    @abstractmethod
    def own_gradients(self) -> list[tuple[str, Tensor]]:
        """What this process holds of the summed gradients, with the module's names; writing into them counts."""

    @abstractmethod
    def stepped(self) -> list[nn.Parameter]:
        """What the optimizer of all processes together holds."""

    @abstractmethod
    def norm(self, own: Iterable[Tensor]) -> Tensor:
        """The 2-norm over all processes of what each holds; all must ask."""


def gradients_of(strategy: Strategy, optimizer: Optimizer | LightningOptimizer) -> list[Tensor]:
    """All that this process's optimizer is about to step on."""
    if isinstance(strategy, SharedStep):
        return [part for _, part in strategy.own_gradients()]
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def named_gradients(module: LightningModule) -> list[tuple[str, Tensor]]:
    """The same with the module's names; of what lies in parts, this process's."""
    strategy = module.trainer.strategy
    if isinstance(strategy, SharedStep):
        return strategy.own_gradients()
    named = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
    return [(name, g.to_local() if isinstance(g, DTensor) else g) for name, g in named]


def stepped_together(strategy: Strategy) -> list[nn.Parameter] | None:
    """What the optimizers of all processes step on, where that is not what they hold."""
    return strategy.stepped() if isinstance(strategy, SharedStep) else None


def multiply(gradients: list[Tensor], factor: float | Tensor) -> None:
    """In place."""
    if gradients:
        torch._foreach_mul_(gradients, factor)


def clip_together(strategy: SharedStep, limit: float, *, by_value: bool) -> None:
    """As `torch.nn.utils.clip_grad_norm_` and `clip_grad_value_` do with whole gradients; 0 leaves them."""
    gradients = [part for _, part in strategy.own_gradients()]
    if limit <= 0:
        return
    if by_value:
        for gradient in gradients:
            gradient.clamp_(-limit, limit)
        return
    norm = strategy.norm(gradients)
    multiply(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))
