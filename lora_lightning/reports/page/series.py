"""The run's log as series of numbers, and which of them belong into one chart."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

LARGEST = 1e300
"""Differences of larger values would not be finite."""
NO_CURVE = ("epoch", "step")
NO_CURVES = ("params/", "export/")
"""Figures of one moment, which the page tells in words."""


@dataclass(frozen=True)
class Series:
    """One column of the log."""

    name: str
    points: tuple[tuple[int, float], ...]
    """(step, value), in the order of steps, finite values only."""
    left_out: int = 0
    """Values that were not finite."""


@dataclass(frozen=True)
class Chart:
    """Series over one pair of axes."""

    title: str
    series: tuple[Series, ...]


def read_metrics(file: Path) -> list[Series]:
    """The columns of a `metrics.csv`, without its rows that a broken-off fit left torn.

    Of two values for one step, as a resumed fit leaves them, the later counts.
    """
    if not file.is_file():
        return []
    reader = csv.DictReader(io.StringIO(file.read_text(encoding="utf-8")))
    columns: dict[str, dict[int, float]] = {name: {} for name in reader.fieldnames or [] if _is_curve(name)}
    for row in reader:
        step = _number(row.get("step"))
        if step is None or not math.isfinite(step):
            continue
        for name, values in columns.items():
            value = _number(row.get(name))
            if value is not None:
                values[int(step)] = value
    return [_series(name, values) for name, values in columns.items() if values]


def _is_curve(name: str) -> bool:
    return bool(name) and name not in NO_CURVE and not name.startswith(NO_CURVES) and not name.endswith("_before")


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _series(name: str, values: dict[int, float]) -> Series:
    finite = tuple((step, value) for step, value in sorted(values.items()) if abs(value) < LARGEST)
    return Series(name, finite, left_out=len(values) - len(finite))


def charts_of(series: list[Series]) -> list[Chart]:
    """The loss, the other figures of each stage, and then what the steps were made of and what they cost."""
    groups: dict[str, list[Series]] = {}
    for one in series:
        if one.points:
            groups.setdefault(title_of(one.name), []).append(one)
    last = ["learning rate", "gradient norm", "samples per second", "tokens per second", "memory, peak in MiB"]
    order = {title: i for i, title in enumerate(last, start=1)}
    first = sorted(groups, key=lambda title: -1 if title == "loss" else order.get(title, 0))
    return [Chart(title, tuple(sorted(groups[title], key=_rank))) for title in first]


def title_of(name: str) -> str:
    """What a chart with this column shows."""
    stage, slash, rest = name.partition("/")
    if name == "lr" or (slash and stage == "lr"):
        return "learning rate"
    if stage == "throughput":
        return rest.replace("_", " ")
    if stage == "memory":
        return "memory, peak in MiB"
    if stage == "grad_norm":
        return "gradient norm"
    if slash and stage.partition("_")[0] in ("train", "val", "test"):
        return rest.removesuffix("_step").removesuffix("_epoch").replace("_", " ")
    return name.replace("_", " ")


def label_of(name: str) -> str:
    """What a line is called beside the others of its chart."""
    stage, slash, rest = name.partition("/")
    if name.endswith("/loss_step"):
        return f"{stage}, one step"
    return stage if slash and stage.partition("_")[0] in ("train", "val", "test") else rest or name


def _rank(series: Series) -> tuple[int, str]:
    stage, _, rest = series.name.partition("/")
    return ("train", "val").index(stage) * 2 - rest.endswith("_step") if stage in ("train", "val") else 9, series.name
