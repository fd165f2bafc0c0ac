"""What several processes do together, and stop at together: an error in one is raised in all, and none waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from lora_lightning.lora.errors import LoRAError

T = TypeVar("T")


def processes() -> int:
    """How many there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This one's number."""
    return distributed.get_rank() if processes() > 1 else 0


def gathered(own: Any) -> list[Any]:
    """Every process's object, in the order of their ranks."""
    if processes() == 1:
        return [own]
    found: list[Any] = [None] * processes()
    distributed.all_gather_object(found, own)
    return found


def agreed(problem: str | None) -> str | None:
    """The first problem that any process has, in all of them; each must call it."""
    return next((told for told in gathered(problem) if told is not None), None)


def together(run: Callable[[], T]) -> T:
    """This process's result, once all have one.

    Raises:
        LoRAError: the first error of any process, in all of them.
    """
    error: Exception | None = None
    try:
        value = run()
    except Exception as caught:  # whatever it is, the others must hear of it
        error = caught
    told = agreed(None if error is None else _said(error))
    if error is not None:
        raise error
    if told is not None:
        raise LoRAError(told)
    return value


def by_first(run: Callable[[], T]) -> T:
    """What process 0 finds, in all of them.

    Raises:
        LoRAError: its error, in all of them.
    """
    value = together(lambda: run() if rank() == 0 else None)
    if processes() > 1:
        held = [value]
        distributed.broadcast_object_list(held, src=0)
        value = held[0]
    return value  # type: ignore[return-value]


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, LoRAError) else f"{type(error).__name__}: {error}"
