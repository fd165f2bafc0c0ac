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


def first_problem(local: str | None) -> str | None:
    """The first problem of any process, in all of them; each must call it."""
    return next((problem for problem in gather(local) if problem is not None), None)


def run_in_all(run: Callable[[], T]) -> T:
    """This process's result, once all have one.

    Raises:
        LoRAError: the first error of any process, in all of them.
    """
    error: Exception | None = None
    try:
        value = run()
    except Exception as caught:  # the others must know of any error
        error = caught
    is_ours = isinstance(error, LoRAError)
    problem = first_problem(None if error is None else str(error) if is_ours else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if problem is not None:
        raise LoRAError(problem)
    return value


def run_in_first(run: Callable[[], T]) -> T:
    """Process 0's result, in all of them.

    Raises:
        LoRAError: its error, in all of them.
    """
    value = run_in_all(lambda: run() if rank() == 0 else None)
    if world_size() > 1:
        shared = [value]
        distributed.broadcast_object_list(shared, src=0)
        value = shared[0]
    return value  # type: ignore[return-value]
