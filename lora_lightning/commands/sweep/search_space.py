"""The search space: flags of `fit`, each with its values or its range."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_lightning.lora.errors import LoRAError

RANK, MATRICES = "model.lora.r", "model.lora.target_modules"
SET_BY_SWEEP = {
    "config": "-c",
    "name": "--name",
    "runs_dir": "--runs_dir",
    "ckpt_path": "nothing: a sweep goes on by itself",
    "seed_everything": "--seeds",
}
"""Flags of fit that a sweep sets itself, and the sweep's flag for each."""
OPEN, CLOSE = "[{(", "]})"


@dataclass(frozen=True)
class Choices:
    """A flag and its values, written as on the command line."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Range:
    """A flag that is sampled from `low` to `high`, both included: an integer if `integer`, log-uniformly if `log`."""

    key: str
    low: float
    high: float
    log: bool = False
    integer: bool = False


Swept = Choices | Range


def choices(text: str) -> Choices:
    """`KEY=V1,V2,...`; a comma within brackets or quotes belongs to its value.

    Raises:
        LoRAError: the form is wrong, or a value is repeated.
    """
    key, values = _key_and_rest(text, "--grid", "model.lora.r=1,2,4,8")
    items = tuple(split(values))
    if not all(items):
        raise LoRAError(f"--grid {text}: expected values with commas between, and one of them is empty")
    if len(set(items)) < len(items):
        raise LoRAError(f"--grid {text}: a value is there twice; for repeats give --seeds 1,2,3")
    return Choices(key, items)


def interval(text: str) -> Range:
    """`KEY=LOW..HIGH` or `KEY=LOW..HIGH:log`; integers where both ends are written without a point.

    Raises:
        LoRAError: the form is wrong, or LOW is not below HIGH.
    """
    key, rest = _key_and_rest(text, "--range", "model.optimizer.init_args.lr=1e-4..1e-2:log")
    ends, _, how = rest.partition(":")
    low, dots, high = ends.partition("..")
    numbers = [number(end) for end in (low, high)]
    if not dots or how not in ("", "log") or None in numbers:
        raise LoRAError(f"--range {text}: expected KEY=LOW..HIGH or KEY=LOW..HIGH:log, such as {key}=1e-4..1e-2:log")
    first, last = (value for value in numbers if value is not None)
    if not first < last or (how == "log" and first <= 0):
        raise LoRAError(f"--range {text}: expected LOW below HIGH{', both above 0 for log' if how else ''}")
    return Range(key, first, last, log=how == "log", integer=all(_is_whole(end) for end in (low, high)))


def space(grid: Sequence[str], ranges: Sequence[str]) -> list[Swept]:
    """All swept flags, in order.

    Raises:
        LoRAError: a flag is named twice, or is one that a sweep sets itself.
    """
    flags: list[Swept] = [*map(choices, grid), *map(interval, ranges)]
    keys = [swept.key for swept in flags]
    for key in keys:
        if keys.count(key) > 1:
            raise LoRAError(f"'{key}' is swept twice: give all its values in one --grid or --range")
        if key in SET_BY_SWEEP:
            raise LoRAError(f"'{key}' cannot be swept: a sweep sets it itself; say it with {SET_BY_SWEEP[key]}")
    return flags


def first_values(swept: Sequence[Swept]) -> list[str]:
    """One value of each, as flags of `fit`, for a check."""
    return [f"--{flag.key}={bounds(flag)[0]}" for flag in swept]


def bounds(flag: Swept) -> list[str]:
    """The values of a grid, or the two ends of a range, as on the command line."""
    if isinstance(flag, Choices):
        return list(flag.values)
    return [str(int(end)) if flag.integer else f"{end:.9g}" for end in (flag.low, flag.high)]


def grid_points(swept: Sequence[Swept]) -> list[dict[str, str]]:
    """Every combination of a grid, the last flag changing first.

    Raises:
        LoRAError: a flag has a range.
    """
    for flag in swept:
        if isinstance(flag, Range):
            raise LoRAError(f"--range {flag.key} has no grid: give --sampler random or tpe, and --trials N")
    keys = [flag.key for flag in swept]
    combinations = itertools.product(*(flag.values for flag in swept if isinstance(flag, Choices)))
    return [dict(zip(keys, values, strict=True)) for values in combinations]


def split(text: str, at: str = ",") -> list[str]:
    """The parts between commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in OPEN) - (letter in CLOSE)
        if letter == at and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def number(text: str) -> float | None:
    """A value as a finite number, else None."""
    try:
        parsed = float(text)
    except ValueError:
        return None
    return parsed if math.isfinite(parsed) else None


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """By key the shortest ending of its dotted name that tells all keys apart."""
    parts = {key: key.split(".") for key in keys}
    count = 1
    while True:
        names = {key: ".".join(names_of[-count:]) for key, names_of in parts.items()}
        if len(set(names.values())) == len(parts) or count >= max(map(len, parts.values())):
            return names
        count += 1


def readable_value(value: str) -> str:
    """A value as text for people: `[query, value]` becomes query, value."""
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") and "[" not in value[1:] else value
    return ", ".join(part.strip("'\"") for part in split(inner)) if inner is not value else value


def _key_and_rest(text: str, option: str, example: str) -> tuple[str, str]:
    key, equals, rest = text.partition("=")
    key = key.strip().removeprefix("--")
    if not equals or not key or not rest.strip():
        raise LoRAError(f"{option} {text}: expected a flag of fit and its values, such as {example}")
    return key, rest.strip()


def _is_whole(text: str) -> bool:
    return text.strip().lstrip("+-").isdigit()
