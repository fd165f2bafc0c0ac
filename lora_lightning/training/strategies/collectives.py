"""What several processes do together; an error in one is raised in all, where all come to the same place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from lora_lightning.lora.errors import LoRAError

T = TypeVar("T")


def world_size() -> int:
    """How many processes there are."""
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


def first_problem(problem_here: str | None) -> str | None:
    """The first problem that any process has, in all of them; each must call it."""
    return next((problem for problem in gather(problem_here) if problem is not None), None)


def run_in_all(run: Callable[[], T]) -> T:
    """This process's result, once all have one.

    Raises:
        LoRAError: the first error of any process, in all of them.
    """
    error: Exception | None = None
    try:
        value = run()
    except Exception as caught:  # whatever it is, the others must hear of it
        error = caught
    is_ours = isinstance(error, LoRAError)
    problem = first_problem(None if error is None else str(error) if is_ours else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if problem is not None:
        raise LoRAError(problem)
    return value


def run_in_first(run: Callable[[], T]) -> T:
    """What process 0 finds, in all of them.

    Raises:
        LoRAError: its error, in all of them.
    """
    value = run_in_all(lambda: run() if rank() == 0 else None)
    if world_size() > 1:
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        value = box[0]
    return value  # type: ignore[return-value]
