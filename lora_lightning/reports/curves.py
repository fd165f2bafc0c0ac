"""A run's log as charts: groups of columns, and the positions of lines, dots and ticks in each.

The page draws them as inline SVG, which follows the reader's light or dark mode and has a tooltip at each point;
positions are linear in step and value.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_lightning.reports.table import Table

LARGEST = 1e300
"""Larger values are left out, since their differences may not be finite."""
NO_CURVE, NO_CURVES = ("epoch", "step"), ("params/", "export/")
"""Columns and prefixes of columns with single values, which the page shows as text."""
WIDTH, HEIGHT = 360, 216
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 24
"""Margins of the frame, in the picture's units, which are about pixels."""
MARKED = 40
"""Up to so many points, each has a dot."""
BUCKETS = 180
"""Longer lines are drawn by the minimum and the maximum in each of so many intervals of steps."""

Point = tuple[int, float]


@dataclass(frozen=True)
class Series:
    """One column of the log."""

    name: str
    points: tuple[Point, ...]
    """(step, value), in the order of steps, finite values only."""
    left_out: int = 0
    """Values that were not finite."""


def read_metrics(file: Path) -> list[Series]:
    """The columns of a `metrics.csv`, without incomplete rows of an interrupted fit.

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


class Axis:
    """The positions of values between two ends of the picture."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def at(self, value: float) -> float:
        """The position of a value in the picture's units."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int, whole: bool = False) -> list[float]:
        """About `about` round values within the axis."""
        raw = (self.high - self.low) / about
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.999)
        step = max(1.0, step) if whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def __str__(self) -> str:
        return f"{self.low!r} {self.high!r} {self.start} {self.end}"


@dataclass(frozen=True)
class Line:
    """A drawn series."""

    series: Series
    color: str
    """The CSS class of its color: a stage has the same in every chart."""
    path: str
    dots: list[tuple[float, float, str]]
    """x, y and tooltip, where the points are few."""
    label: str
    last: str
    range: str
    """Minimum and maximum, where there is more than one value."""


@dataclass(frozen=True)
class Chart:
    """Series over one pair of axes."""

    title: str
    series: tuple[Series, ...]
    best_step: int | None = None
    x: Axis = field(init=False)
    y: Axis = field(init=False)

    def __post_init__(self) -> None:
        """Compute both axes, with room above and below."""
        steps = [step for column in self.series for step, _ in column.points]
        values = [value for column in self.series for _, value in column.points]
        low, high = min(values), max(values)
        flat = high - low <= 1e-9 * max(abs(high), abs(low))
        room = max(abs(high) * 0.1, 1e-12) if flat else (high - low) * 0.06
        bottom = 0.0 if low == 0 < high else low - room
        first, last = min(steps), max(steps)
        across = (first, last) if last > first else (first - 1, last + 1)
        object.__setattr__(self, "x", Axis(float(across[0]), float(across[1]), LEFT + 4, WIDTH - RIGHT - 4))
        object.__setattr__(self, "y", Axis(bottom, high + room, HEIGHT - BOTTOM, TOP))

    @property
    def lines(self) -> list[Line]:
        """The lines, in the order of the legend."""
        return [self._line(column, i) for i, column in enumerate(self.series)]

    def _line(self, series: Series, index: int) -> Line:
        values = [value for _, value in series.points]
        label = label_of(series.name)
        dots = [
            (self.x.at(step), self.y.at(value), f"{series.name} {value:.6g} at step {step}")
            for step, value in series.points
            if len(series.points) <= MARKED
        ]
        path = " L".join(f"{self.x.at(step):.2f} {self.y.at(value):.2f}" for step, value in thin_out(series.points))
        extent = f" ({short(min(values))} to {short(max(values))})" if len(values) > 1 else ""
        return Line(series, color_of(series.name, index), f"M{path}", dots, label, short(values[-1]), extent)

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Positions and labels."""
        return [(self.y.at(value), short(value)) for value in self.y.ticks(5)]

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """Positions and labels, the first of which has the word step."""
        steps = self.x.ticks(6, whole=True)
        return [(self.x.at(s), short(s) if i else f"step {s:g}") for i, s in enumerate(steps)]

    @property
    def best(self) -> float | None:
        """The position of the best checkpoint's step, in a chart of validation metrics."""
        measured = any(column.name.startswith("val") for column in self.series)
        step = self.best_step
        return self.x.at(step) if step is not None and measured and self.x.low <= step <= self.x.high else None


def charts_of(
    series: Sequence[Series], best_step: int | None = None, titles: Mapping[str, str] | None = None
) -> list[Chart]:
    """Charts of the loss, of the other metrics of each stage, and then of learning rates, gradients, speed and memory.

    Args:
        series: the log's columns.
        best_step: the best checkpoint's.
        titles: of metrics whose names are not clear enough: `{"f1": "F1 (macro)"}`.
    """
    groups: dict[str, list[Series]] = {}
    for column in series:
        if column.points:
            groups.setdefault(title_of(column.name, titles or {}), []).append(column)
    last = ["learning rate", "gradient norm", "samples per second", "tokens per second", "memory, peak in MiB"]
    order = {title: i for i, title in enumerate(last, start=1)}
    first = sorted(groups, key=lambda title: -1 if title == "loss" else order.get(title, 0))
    return [Chart(title, tuple(sorted(groups[title], key=_rank)), best_step) for title in first]


def title_of(name: str, titles: Mapping[str, str]) -> str:
    """The title of the chart with this column."""
    stage, slash, rest = name.partition("/")
    if name == "lr" or (slash and stage == "lr"):
        return "learning rate"
    if stage == "throughput":
        return rest.replace("_", " ")
    if stage == "memory":
        return "memory, peak in MiB"
    if stage == "grad_norm":
        return "gradient norm"
    if slash and _is_stage(stage):
        metric = rest.removesuffix("_step").removesuffix("_epoch")
        return titles.get(metric, metric.replace("_", " "))
    return name.replace("_", " ")


def label_of(name: str) -> str:
    """The label of a line in its chart."""
    stage, slash, rest = name.partition("/")
    if name.endswith("/loss_step"):
        return f"{stage}, one step"
    return stage if slash and _is_stage(stage) else rest or name


def _is_stage(name: str) -> bool:
    return name.partition("_")[0] in ("train", "val", "test")


def _rank(series: Series) -> tuple[int, str]:
    stage, _, rest = series.name.partition("/")
    return ("train", "val").index(stage) * 2 - rest.endswith("_step") if stage in ("train", "val") else 9, series.name


def color_of(name: str, index: int) -> str:
    """The CSS class of a column's line."""
    stage, _, rest = name.partition("/")
    if stage == "train":
        return "train faint" if rest.endswith("_step") else "train"
    return stage if stage in ("val", "test") else f"line{index % 5}"


def thin_out(points: tuple[Point, ...]) -> list[Point]:
    """Points to draw: all of them, or the minimum and the maximum of each interval, and the two ends."""
    if len(points) <= 2 * BUCKETS:
        return list(points)
    size = math.ceil(len(points) / BUCKETS)
    points_to_draw = {points[0], points[-1]}
    for i in range(0, len(points), size):
        stretch = points[i : i + size]
        points_to_draw |= {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
    return sorted(points_to_draw)


def numbers_table(series: Sequence[Series]) -> Table:
    """The charts' content as a table."""
    rows = []
    for column in (s for s in series if s.points):
        least, most = min(column.points, key=lambda p: p[1]), max(column.points, key=lambda p: p[1])
        cells = [f"{column.points[0][1]:.6g}", f"{column.points[-1][1]:.6g}"]
        cells += [f"{value:.6g} at {step}" for step, value in (least, most)]
        rows.append([column.name, str(len(column.points)), *cells])
    header = ["column of metrics.csv", "points", "first", "last", "least, at step", "greatest, at step"]
    return Table(header=header, rows=rows, code=True)


def short(value: float) -> str:
    """A number in few characters, to four digits."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:,.0f}" if size >= 1e4 else f"{value:.4g}"
