"""A chart of lines as SVG, drawn here so that the page needs neither network nor script.

Positions are linear in step and value; `data-` attributes on the frame say where the axes lie.
"""

from __future__ import annotations

import math

from lora_lightning.reports.page.markup import Markup, joined, tag
from lora_lightning.reports.page.series import Chart, Series, label_of

WIDTH, HEIGHT = 360, 216
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 24
"""Margins of the frame, in the units of the picture, which are about pixels at each size that the page has."""

MARKED = 40
"""Up to so many points each has a dot."""
BUCKETS = 180
"""Longer lines are drawn by the least and the greatest value in each of so many stretches of steps."""


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


def figure(chart: Chart, best_step: int | None = None) -> Markup:
    """The chart with its title and legend, and a line at the step of the best checkpoint where that was measured."""
    x, y = axes_of(chart.series)
    many = len(chart.series) > 1
    colours = [colour_of(one, i) for i, one in enumerate(chart.series)]
    lines = [line(one, x, y, colour) for one, colour in zip(chart.series, colours, strict=True)]
    told = ", ".join(f"{label_of(one.name)} {short(one.points[-1][1])}" for one in chart.series)
    picture = tag(
        "svg",
        tag("g", *_grid(x, y), class_="grid"),
        *_best(chart, best_step, x),
        *lines,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{chart.title} over steps; last: {told}",
        data_x=f"{x.low!r} {x.high!r} {x.start} {x.end}",
        data_y=f"{y.low!r} {y.high!r} {y.start} {y.end}",
    )
    legend = [_entry(one, colour, many) for one, colour in zip(chart.series, colours, strict=True)]
    return tag("figure", tag("figcaption", chart.title), picture, tag("ul", *legend, class_="legend"), class_="chart")


def axes_of(series: tuple[Series, ...]) -> tuple[Axis, Axis]:
    """Both axes, with room above and below."""
    steps = [step for one in series for step, _ in one.points]
    values = [value for one in series for _, value in one.points]
    low, high = min(values), max(values)
    flat = high - low <= 1e-9 * max(abs(high), abs(low))
    room = max(abs(high) * 0.1, 1e-12) if flat else (high - low) * 0.06
    bottom = 0.0 if low == 0 < high else low - room
    first, last = min(steps), max(steps)
    across = (first, last) if last > first else (first - 1, last + 1)
    return (
        Axis(float(across[0]), float(across[1]), LEFT + 4, WIDTH - RIGHT - 4),
        Axis(bottom, high + room, HEIGHT - BOTTOM, TOP),
    )


def colour_of(series: Series, index: int) -> str:
    """The class that gives a line its colour: stages keep theirs in every chart."""
    stage, _, rest = series.name.partition("/")
    if stage == "train":
        return "train faint" if rest.endswith("_step") else "train"
    return stage if stage in ("val", "test") else f"line{index % 5}"


def line(series: Series, x: Axis, y: Axis, colour: str) -> Markup:
    """A path through the points, dots where they are few, and what each is as a tip."""
    shown = thinned(series.points)
    way = " L".join(f"{x.at(step):.2f} {y.at(value):.2f}" for step, value in shown)
    dots = [
        tag(
            "circle",
            tag("title", f"{series.name} {value:.6g} at step {step}"),
            cx=f"{x.at(step):.2f}",
            cy=f"{y.at(value):.2f}",
            r="2.5" if "faint" not in colour else "1.5",
        )
        for step, value in series.points
        if len(series.points) <= MARKED
    ]
    return tag("g", tag("path", d=f"M{way}"), *dots, class_=f"line {colour}", data_series=series.name)


def thinned(points: tuple[tuple[int, float], ...]) -> list[tuple[int, float]]:
    """Points to draw: all of them, or the least and the greatest of each stretch, and the two ends."""
    if len(points) <= 2 * BUCKETS:
        return list(points)
    size = math.ceil(len(points) / BUCKETS)
    kept = {points[0], points[-1]}
    for i in range(0, len(points), size):
        stretch = points[i : i + size]
        kept |= {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
    return sorted(kept)


def _grid(x: Axis, y: Axis) -> list[Markup]:
    found = []
    for value in y.ticks(5):
        at = f"{y.at(value):.2f}"
        found.append(tag("path", d=f"M{LEFT} {at} H{WIDTH - RIGHT}"))
        found.append(tag("text", short(value), x=LEFT - 6, y=at, dy="0.32em", text_anchor="end"))
    for i, step in enumerate(x.ticks(6, whole=True)):
        told = f"step {step:g}" if i == 0 else short(step)
        found.append(tag("text", told, x=f"{x.at(step):.2f}", y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
    return found


def _best(chart: Chart, step: int | None, x: Axis) -> list[Markup]:
    measured = any(one.name.startswith("val") for one in chart.series)
    if step is None or not measured or not x.low <= step <= x.high:
        return []
    tip = tag("title", f"the best checkpoint, at step {step}")
    return [tag("path", tip, d=f"M{x.at(step):.2f} {TOP} V{HEIGHT - BOTTOM}", class_="best")]


def _entry(series: Series, colour: str, many: bool) -> Markup:
    values = [value for _, value in series.points]
    name = [tag("i", class_=colour), f"{label_of(series.name)} "] if many else []
    told: list[str] = [tag("b", short(values[-1]))]
    if len(values) > 1:
        told.append(f" ({short(min(values))} to {short(max(values))})")
    if series.left_out:
        told.append(f", {series.left_out} not finite")
    return tag("li", *name, joined(*told))


def short(value: float) -> str:
    """A number in few characters, to four digits."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:,.0f}" if size >= 1e4 else f"{value:.4g}"
