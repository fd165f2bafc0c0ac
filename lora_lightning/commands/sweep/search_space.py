"""The search space: flags of `fit`, each with its values or its range as one of Optuna's distributions."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_lightning.lora.errors import LoRAError, MissingPackageError

if TYPE_CHECKING:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    Distribution = CategoricalDistribution | FloatDistribution | IntDistribution

Values = dict[str, str]
"""A point: by flag its value, written as on the command line."""
Space = dict[str, "Distribution"]
"""By flag the values of a `--grid`, written as on the command line, or the range of a `--range`."""
RANK, MATRICES = "model.lora.r", "model.lora.target_modules"
SET_BY_SWEEP = {
    "config": "-c",
    "name": "--name",
    "runs_dir": "--runs_dir",
    "ckpt_path": "nothing: a sweep goes on by itself",
    "seed_everything": "--seeds",
}
"""Flags of fit that a sweep sets itself, and the sweep's flag for each."""


def import_optuna() -> Any:
    """Import Optuna and silence its log.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingPackageError("sweeps need optuna: pip install 'lora_lightning[sweeps]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def parse_space(grid: Sequence[str], ranges: Sequence[str]) -> Space:
    """All swept flags, in order.

    Raises:
        LoRAError: a text has another form, or a flag is named twice, or is one that a sweep sets itself.
    """
    space: Space = {}
    for key, values in [*map(parse_grid, grid), *map(parse_range, ranges)]:
        if key in space:
            raise LoRAError(f"'{key}' is swept twice: give all its values in one --grid or --range")
        if key in SET_BY_SWEEP:
            raise LoRAError(f"'{key}' cannot be swept: a sweep sets it itself; say it with {SET_BY_SWEEP[key]}")
        space[key] = values
    return space


def parse_grid(text: str) -> tuple[str, CategoricalDistribution]:
    """`KEY=V1,V2,...`; a comma within brackets or quotes belongs to its value."""
    key, rest = _key_and_rest(text, "--grid", "model.lora.r=1,2,4,8")
    values = split(rest)
    if not all(values):
        raise LoRAError(f"--grid {text}: expected values with commas between, and one of them is empty")
    if len(set(values)) < len(values):
        raise LoRAError(f"--grid {text}: a value is there twice; for repeats give --seeds 1,2,3")
    return key, import_optuna().distributions.CategoricalDistribution(values)


def parse_range(text: str) -> tuple[str, IntDistribution | FloatDistribution]:
    """`KEY=LOW..HIGH` or `KEY=LOW..HIGH:log`; integers where both ends are written without a point."""
    key, rest = _key_and_rest(text, "--range", "model.optimizer.init_args.lr=1e-4..1e-2:log")
    ends, _, how = rest.partition(":")
    first, _, last = ends.partition("..")
    low, high = number(first), number(last)
    if how not in ("", "log") or low is None or high is None:
        raise LoRAError(f"--range {text}: expected KEY=LOW..HIGH or KEY=LOW..HIGH:log, such as {key}=1e-4..1e-2:log")
    if not low < high or (how and low <= 0):
        raise LoRAError(f"--range {text}: expected LOW below HIGH{', both above 0 for log' if how else ''}")
    kinds = import_optuna().distributions
    if all(end.strip().lstrip("+-").isdigit() for end in (first, last)):
        return key, kinds.IntDistribution(int(low), int(high), log=bool(how))
    return key, kinds.FloatDistribution(low, high, log=bool(how))


def _key_and_rest(text: str, option: str, example: str) -> tuple[str, str]:
    key, _, rest = text.partition("=")
    key = key.strip().removeprefix("--")
    if not key or not rest.strip():
        raise LoRAError(f"{option} {text}: expected a flag of fit and its values, such as {example}")
    return key, rest.strip()


def text_of(value: Any) -> str:
    """A value of Optuna's as on the command line: nine digits tell any two numbers of a sweep apart."""
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def bounds(values: Distribution) -> list[str]:
    """The values of a grid, or the two ends of a range."""
    ends = values.choices if hasattr(values, "choices") else (values.low, values.high)
    return [text_of(end) for end in ends]


def fixed_of(values: Distribution) -> list[str] | str:
    """What Optuna's samplers keep as they began with it: the values of a grid, and a range's kind of numbers."""
    if hasattr(values, "choices"):
        return bounds(values)
    return ("whole numbers" if isinstance(values.low, int) else "numbers") + (", log" if values.log else "")


def first_values(space: Space) -> list[str]:
    """One value of each, as flags of `fit`, for a check."""
    return [f"--{key}={bounds(values)[0]}" for key, values in space.items()]


def grid_points(space: Space) -> list[Values]:
    """Every combination of a grid, the last flag changing first.

    Raises:
        LoRAError: a flag has a range.
    """
    for key, values in space.items():
        if not hasattr(values, "choices"):
            raise LoRAError(f"--range {key} has no grid: give --sampler random or tpe, and --trials N")
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*map(bounds, space.values()))]


def split(text: str) -> list[str]:
    """The parts between commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and not depth and not quote:
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
    names: dict[str, str] = {}
    for count in itertools.count(1):
        names = {key: ".".join(key.split(".")[-count:]) for key in keys}
        if len(set(names.values())) == len(names):
            break
    return names


def point_text(values: Values) -> str:
    """A point as text for people: `r = 4, lr = 1e-3`."""
    names = short_names(list(values))
    return ", ".join(f"{names[key]} = {readable_value(value)}" for key, value in values.items())


def readable_value(value: str) -> str:
    """A value as text for people: `[query, value]` becomes query, value."""
    if not (value.startswith("[") and value.endswith("]")) or "[" in value[1:]:
        return value
    return ", ".join(part.strip("'\"") for part in split(value[1:-1]))
