"""A run's log as charts: groups of columns, and the positions of lines, dots and ticks in each.

The page draws them as inline SVG, which follows the reader's light or dark mode and has a tooltip at each point;
positions are linear in step and value.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lightning.reports.table import Table

LARGEST = 1e300
"""Larger values are left out, since their differences may not be finite."""
NO_CURVE, NO_CURVES = ("", "epoch", "step"), ("params/", "export/")
"""Columns and prefixes of columns with single values, which the page shows as text."""
TITLES = {"lr": "learning rate", "grad_norm": "gradient norm", "memory": "memory, peak in MiB"}
"""Titles of charts by what stands before a column's slash."""
LAST = ["learning rate", "gradient norm", "samples per second", "tokens per second", "memory, peak in MiB"]
"""The charts behind those of the metrics."""
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

    @property
    def stage(self) -> str:
        """`train`, `val_mismatched` and so on; empty for what is measured of no set."""
        stage, slash, _ = self.name.partition("/")
        return stage if slash and stage.partition("_")[0] in ("train", "val", "test") else ""

    @property
    def metric(self) -> str:
        """The name without its stage."""
        return self.name.removeprefix(f"{self.stage}/")

    def title(self, titles: Mapping[str, str]) -> str:
        """The title of the chart with this column."""
        if kind := TITLES.get(self.name.partition("/")[0]):
            return kind
        metric = self.metric.removeprefix("throughput/").removesuffix("_step").removesuffix("_epoch")
        return titles.get(metric, metric.replace("_", " "))


def read_metrics(file: Path) -> list[Series]:
    """The columns of a `metrics.csv`, without incomplete rows of an interrupted fit.

    Of two values for one step, as a resumed fit leaves them, the later counts.
    """
    reader = csv.DictReader(io.StringIO(file.read_text(encoding="utf-8") if file.is_file() else ""))
    columns: dict[str, dict[int, float]] = {
        name: {}
        for name in reader.fieldnames or ()
        if not (name in NO_CURVE or name.startswith(NO_CURVES) or name.endswith("_before"))
    }
    for row in reader:
        step = _number(row.get("step"))
        if step is None or not math.isfinite(step):
            continue
        for name, values in columns.items():
            if (value := _number(row.get(name))) is not None:
                values[int(step)] = value
    finite = {n: tuple((s, x) for s, x in sorted(v.items()) if abs(x) < LARGEST) for n, v in columns.items() if v}
    return [Series(name, points, left_out=len(columns[name]) - len(points)) for name, points in finite.items()]


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


@dataclass(frozen=True)
class Axis:
    """The positions `start` to `end`, in the picture's units, of the values `low` to `high`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The position of a value."""
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


def charts_of(
    series: Sequence[Series], best_step: int | None = None, titles: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Charts of the loss, of the other metrics of each stage, and then of learning rates, gradients, speed and memory.

    Args:
        series: the log's columns.
        best_step: the best checkpoint's.
        titles: of metrics whose names are not clear enough: `{"f1": "F1 (macro)"}`.

    Returns:
        What the template draws of each chart, see `chart_of`.
    """
    groups: dict[str, list[Series]] = {}
    for column in series:
        if column.points:
            groups.setdefault(column.title(titles or {}), []).append(column)
    order = {"loss": -1} | {title: i for i, title in enumerate(LAST, start=1)}
    return [chart_of(title, groups[title], best_step) for title in sorted(groups, key=lambda t: order.get(t, 0))]


def chart_of(title: str, series: Sequence[Series], best_step: int | None) -> dict[str, Any]:
    """Series over one pair of axes, with room above and below: the axes, their ticks, and the lines.

    `best` is the position of the best checkpoint's step, in a chart of validation metrics.
    """
    steps, values = zip(*(point for column in series for point in column.points), strict=True)
    low, high = min(values), max(values)
    flat = high - low <= 1e-9 * max(abs(high), abs(low))
    room = max(abs(high) * 0.1, 1e-12) if flat else (high - low) * 0.06
    bottom = 0.0 if low == 0 < high else low - room
    one_step = min(steps) == max(steps)
    x = Axis(float(min(steps) - one_step), float(max(steps) + one_step), LEFT + 4, WIDTH - RIGHT - 4)
    y = Axis(bottom, high + room, HEIGHT - BOTTOM, TOP)
    validated = any(column.name.startswith("val") for column in series)
    order = sorted(series, key=lambda c: (c.stage != "train", c.stage != "val", not c.name.endswith("_step"), c.name))
    return {
        "title": title,
        "x": x,
        "y": y,
        "x_ticks": [(x.at(s), short(s) if i else f"step {s:g}") for i, s in enumerate(x.ticks(6, whole=True))],
        "y_ticks": [(y.at(value), short(value)) for value in y.ticks(5)],
        "best": x.at(best_step) if best_step is not None and validated and x.low <= best_step <= x.high else None,
        "best_step": best_step,
        "lines": [_line(column, x, y, color=f"line{i % 5}") for i, column in enumerate(order)],
    }


def _line(series: Series, x: Axis, y: Axis, color: str) -> dict[str, Any]:
    """A line, with tooltips where the points are few; a stage has the same color in every chart."""
    stage, values = series.stage, [value for _, value in series.points]
    faint = stage == "train" and series.metric.endswith("_step")
    label = stage or series.name.partition("/")[2] or series.name
    return {
        "name": series.name,
        "left_out": series.left_out,
        "color": "train faint" if faint else stage if stage in ("train", "val", "test") else color,
        "label": f"{stage}, one step" if series.metric == "loss_step" else label,
        "path": "M" + " L".join(f"{x.at(step):.2f} {y.at(value):.2f}" for step, value in thin_out(series.points)),
        "dots": [
            (x.at(step), y.at(value), f"{series.name} {value:.6g} at step {step}")
            for step, value in series.points
            if len(values) <= MARKED
        ],
        "last": short(values[-1]),
        "range": f" ({short(min(values))} to {short(max(values))})" if len(values) > 1 else "",
    }


def thin_out(points: tuple[Point, ...]) -> list[Point]:
    """Points to draw: all of them, or the minimum and the maximum of each interval, and the two ends."""
    if len(points) <= 2 * BUCKETS:
        return list(points)
    size = math.ceil(len(points) / BUCKETS)
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    peaks = {find(stretch, key=lambda point: point[1]) for stretch in stretches for find in (min, max)}
    return sorted({points[0], points[-1], *peaks})


def numbers_table(series: Sequence[Series]) -> Table:
    """The charts' content as a table."""
    rows = []
    for column in (s for s in series if s.points):
        ends = [f"{column.points[i][1]:.6g}" for i in (0, -1)]
        extremes = (find(column.points, key=lambda point: point[1]) for find in (min, max))
        peaks = [f"{value:.6g} at {step}" for step, value in extremes]
        rows.append([column.name, str(len(column.points)), *ends, *peaks])
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
