"""A run's log as charts: which columns stand together, and where lines, dots and ticks lie in each picture.

The page draws them as SVG of its own, which follows the reader's light or dark and has a tip at each point; positions
are linear in step and value.
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
"""Differences of larger values would not be finite."""
NO_CURVE, NO_CURVES = ("epoch", "step"), ("params/", "export/")
"""Columns and beginnings of columns that hold figures of one moment, which the page tells in words."""
WIDTH, HEIGHT = 360, 216
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 24
"""Margins of the frame, in the units of the picture, which are about pixels at each size that the page has."""
MARKED = 40
"""Up to so many points each has a dot."""
BUCKETS = 180
"""Longer lines are drawn by the least and the greatest value in each of so many stretches of steps."""

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


class Axis:
    """Where values lie between two ends of the picture."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def at(self, value: float) -> float:
        """In the picture's units."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int, whole: bool = False) -> list[float]:
        """Round values inside the axis, about so many."""
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
    """One series as it is drawn."""

    series: Series
    color: str
    """The class that gives it its color: stages keep theirs in every chart."""
    path: str
    dots: list[tuple[float, float, str]]
    """x, y and tip, where the points are few."""
    label: str
    last: str
    range: str
    """Least and greatest, where there is more than one."""


@dataclass(frozen=True)
class Chart:
    """Series over one pair of axes."""

    title: str
    series: tuple[Series, ...]
    best_step: int | None = None
    x: Axis = field(init=False)
    y: Axis = field(init=False)

    def __post_init__(self) -> None:
        """Both axes, with room above and below."""
        steps = [step for one in self.series for step, _ in one.points]
        values = [value for one in self.series for _, value in one.points]
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
        """What the picture shows, in the order of its legend."""
        return [self._line(one, i) for i, one in enumerate(self.series)]

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
        """Position and words."""
        return [(self.y.at(value), short(value)) for value in self.y.ticks(5)]

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """Position and words, of which the first says that these are steps."""
        steps = self.x.ticks(6, whole=True)
        return [(self.x.at(s), short(s) if i else f"step {s:g}") for i, s in enumerate(steps)]

    @property
    def best(self) -> float | None:
        """Where the step of the best checkpoint is, in a chart of what was measured then."""
        measured = any(one.name.startswith("val") for one in self.series)
        step = self.best_step
        return self.x.at(step) if step is not None and measured and self.x.low <= step <= self.x.high else None


def charts_of(
    series: Sequence[Series], best_step: int | None = None, titles: Mapping[str, str] | None = None
) -> list[Chart]:
    """The loss, the other figures of each stage, and then what the steps were made of and what they cost.

    Args:
        series: the log's columns.
        best_step: that of the best checkpoint.
        titles: what metrics are called where their own names do not say it: `{"f1": "F1 (macro)"}`.
    """
    groups: dict[str, list[Series]] = {}
    for one in series:
        if one.points:
            groups.setdefault(title_of(one.name, titles or {}), []).append(one)
    last = ["learning rate", "gradient norm", "samples per second", "tokens per second", "memory, peak in MiB"]
    order = {title: i for i, title in enumerate(last, start=1)}
    first = sorted(groups, key=lambda title: -1 if title == "loss" else order.get(title, 0))
    return [Chart(title, tuple(sorted(groups[title], key=_rank)), best_step) for title in first]


def title_of(name: str, titles: Mapping[str, str]) -> str:
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
    if slash and _is_stage(stage):
        metric = rest.removesuffix("_step").removesuffix("_epoch")
        return titles.get(metric, metric.replace("_", " "))
    return name.replace("_", " ")


def label_of(name: str) -> str:
    """What a line is called beside the others of its chart."""
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
    """The class of a column's line."""
    stage, _, rest = name.partition("/")
    if stage == "train":
        return "train faint" if rest.endswith("_step") else "train"
    return stage if stage in ("val", "test") else f"line{index % 5}"


def thin_out(points: tuple[Point, ...]) -> list[Point]:
    """Points to draw: all of them, or the least and the greatest of each stretch, and the two ends."""
    if len(points) <= 2 * BUCKETS:
        return list(points)
    size = math.ceil(len(points) / BUCKETS)
    drawn = {points[0], points[-1]}
    for i in range(0, len(points), size):
        stretch = points[i : i + size]
        drawn |= {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
    return sorted(drawn)


def numbers_table(series: Sequence[Series]) -> Table:
    """What the charts show, as a table."""
    rows = []
    for one in (s for s in series if s.points):
        least, most = min(one.points, key=lambda p: p[1]), max(one.points, key=lambda p: p[1])
        cells = [f"{one.points[0][1]:.6g}", f"{one.points[-1][1]:.6g}"]
        cells += [f"{value:.6g} at {step}" for step, value in (least, most)]
        rows.append([one.name, str(len(one.points)), *cells])
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
