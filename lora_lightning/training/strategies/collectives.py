"""Collective calls of all processes; an error in one is raised in all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import Trainer
from torch import distributed

from lora_lightning.lora.errors import LoRAError

T = TypeVar("T")


def world_size() -> int:
    """The number of processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This process's number."""
    return distributed.get_rank() if world_size() > 1 else 0


def gather(value: Any) -> list[Any]:
    """Every process's object, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def reduce_number(trainer: Trainer, local: float, operation: Literal["sum", "max"]) -> float:
    """The sum or the maximum of all processes' numbers, in all of them."""
    if trainer.world_size == 1:
        return local
    number = torch.tensor(float(local), dtype=torch.float64, device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(number, reduce_op=operation))


def run_in_all(run: Callable[[], T]) -> T:
    """This process's result, once all have one; the first error of any process is a LoRAError in the others."""
    try:
        value = run()
    except Exception as error:  # the others must know of any error
        gather(str(error) if isinstance(error, LoRAError) else f"{type(error).__name__}: {error}")
        raise
    if problem := next(filter(None, gather(None)), None):
        raise LoRAError(problem)
    return value


def run_in_first(run: Callable[[], T]) -> T:
    """Process 0's result, or its error as a LoRAError, in all of them."""
    shared = [run_in_all(lambda: run() if rank() == 0 else None)]
    if world_size() > 1:
        distributed.broadcast_object_list(shared, src=0)
    return shared[0]  # type: ignore[return-value]
