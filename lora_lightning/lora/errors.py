"""The errors that a user can cause. Each says what was expected, what came and what to do."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable, Mapping


class LoRAError(ValueError):
    """Base of every error that bad input causes; the command prints it as one line."""


class ConfigError(LoRAError):
    """A field of `LoRAConfig` has an invalid value."""


class TargetError(LoRAError):
    """A pattern selects nothing, or something that cannot be adapted."""


class AdapterError(LoRAError):
    """An adapter's files, keys, shapes or base do not fit the model."""


class MergeError(LoRAError):
    """The update cannot be folded into W0."""


class MissingPackageError(ImportError):
    """A package is not installed. The message names the extra that brings it."""


class AdapterWarning(UserWarning):
    """Another library will read an adapter's files differently, or a setting in them is not used here."""


def warn(message: str) -> None:
    """Issue an AdapterWarning that points at the user's line, the first one outside this package."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and str(frame.f_globals.get("__name__")).startswith("lora_lightning."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, AdapterWarning, stacklevel=level)


REMOVED = {
    "prepare_weights": "leave it out, the products with W0 are torch's own",
    "recompute_inputs": "leave it out, or take activation_checkpointing: true",
    **dict.fromkeys(
        ("tensor_parallel_size", "tensor_parallel_plan", "data_parallel_size"),
        "leave it out, weights and batches are sharded over all devices",
    ),
    "save_distributed_checkpoint": "leave it out, a checkpoint is one file, and holds what trains alone",
}
"""Removed functions, arguments and config keys, and what to take in their place."""


def refuse_unknown(what: str, value: object, known: Iterable[str]) -> None:
    """Raise a LoRAError for a value that is none of the known ones."""
    names = list(known)
    if value not in names:
        raise LoRAError(f"{what} is one of {', '.join(names)}, got {value!r}{did_you_mean(str(value), names)}")


def refuse_removed(what: str, arguments: Mapping[str, object]) -> None:
    """Raise for arguments that `what` does not take.

    Raises:
        LoRAError: an argument is in `REMOVED`; the error says what to take.
        TypeError: an unknown argument, as Python raises it.
    """
    for name in arguments:
        if name in REMOVED:
            raise LoRAError(f"{what} takes no {name} any more: {REMOVED[name]}")
        raise TypeError(f"{what} got an unexpected keyword argument '{name}'")


def near_misses(word: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The known names nearest to `word`, best first, without regard to case; `word` inside a longer name counts too."""
    names = sorted(set(known))
    lower = {name.lower(): name for name in reversed(names)}
    close = [lower[hit] for hit in difflib.get_close_matches(word.lower(), lower, n=limit, cutoff=0.55)]
    inside = [name for name in names if word and word.lower() in name.lower() and name not in close]
    return (close + inside)[:limit]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'query'?"`, or an empty string where nothing is near."""
    return suggestion(near_misses(word, known))


def suggestion(names: Iterable[object]) -> str:
    """`"; did you mean 'query' or 'key'?"`, or an empty string without names."""
    quoted = " or ".join(f"'{name}'" for name in names)
    return f"; did you mean {quoted}?" if quoted else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type where there is none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def first_few(items: list[str], limit: int = 4) -> str:
    """The first items, separated by commas, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
