"""The figures of a sweep: the paper's Table 6 (rank against matrices), its Table 5 (matrices at an equal number of
parameters), the metric against any other flag, and the course of halving."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_lightning.commands.sweep.ranking import Point
from lora_lightning.commands.sweep.search_space import MATRICES, RANK, number, point_text, readable_value, short_names
from lora_lightning.reports.console import short_count
from lora_lightning.reports.figures import COLORS, COLUMN, PAGE, Drawing, figure, plot_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figures(
    points: Sequence[Point],
    keys: Sequence[str],
    metric: str,
    budget: int | None,
    decisions: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Drawing]:
    """The figures that suit the swept flags, of the complete points with a value, by file name.

    Args:
        points: the best first.
        decisions: the content of `halving.json`: the values at each rung, and the members that were dropped.
    """
    done = [point for point in points if point.state == "complete" and point.mean is not None]
    names, drawings = short_names(keys), {}
    others = [key for key in keys if key not in (RANK, MATRICES)]
    note = " Bars: standard deviation between seeds." if any(point.sd for point in done) else ""
    note += " Of several points with one place the best is shown." if others else ""
    with plot_style():
        if decisions:
            caption = (
                f"{metric} of each member at the rungs, and its best checkpoint's; a cross is where it was dropped."
            )
            drawings["halving"] = Drawing("Halving", caption, halving_curves(decisions, points, metric))
        if done and budget is not None:
            caption = f"Each set at the rank with which nearest to {budget:,} parameters train (the paper's Table 5)."
            title = "Which matrices, at an equal number of parameters"
            drawings["matrices"] = Drawing(title, caption + note, matrices(_best(done, MATRICES), metric))
        elif done and RANK in keys:
            title, caption = "Rank", f"{metric} by r."
            if MATRICES in keys:
                title, caption = "Rank against which matrices", "The paper's Table 6."
            drawings["rank"] = Drawing(title, caption + note, rank_curves(_best(done, MATRICES, RANK), metric))
        elif done and MATRICES in keys:
            caption = "All at the same rank." + note
            drawings["matrices"] = Drawing("Which matrices", caption, matrices(_best(done, MATRICES), metric))
        for key in others if done else ():
            caption = f"{metric} of every point by {key}."
            drawings[names[key].replace(".", "-")] = Drawing(names[key], caption, scatter(done, key, metric))
    return drawings


def rank_curves(points: Sequence[Point], metric: str) -> Figure:
    """The metric over r: a line for each set of matrices, and beside it the table of means, colored.

    Where the sets are not swept, one line with the number of trained parameters at each point.
    """
    sets = list(dict.fromkeys(point.values.get(MATRICES, "") for point in points))
    ranks = sorted({float(point.values[RANK]) for point in points})
    has_sets = MATRICES in points[0].values
    canvas = figure(PAGE, 3.1) if has_sets else figure(COLUMN, 2.8)
    axis, *beside = np.atleast_1d(canvas.subplots(1, 1 + has_sets, width_ratios=[1.1, 1][: 1 + has_sets]))
    cells = np.full((len(sets), len(ranks)), np.nan)
    style = {"marker": "o", "markersize": 3.5, "linewidth": 1.4, "elinewidth": 0.8, "capsize": 2}
    for row, name in enumerate(sets):
        line = [point for point in points if point.values.get(MATRICES, "") == name]
        at, (means, spread) = [float(point.values[RANK]) for point in line], _values(line)
        label, color = readable_value(name), COLORS[row % len(COLORS)]
        axis.errorbar(at, means, spread if spread.any() else None, color=color, label=label, **style)
        cells[row, [ranks.index(r) for r in at]] = means
    if ranks[0] > 0:
        axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [f"{r:g}" for r in ranks])
    axis.minorticks_off()
    axis.set_ylabel(metric)
    if has_sets:
        axis.set_xlabel("rank r")
        handles, labels = axis.get_legend_handles_labels()
        columns = min(len(sets), 3)
        canvas.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=1.2)
        _draw_cells(beside[0], cells, [_fold(name) for name in sets], [f"{r:g}" for r in ranks], metric)
        return canvas
    axis.set_xlabel("rank r, with the number of parameters that train")
    axis.margins(y=0.2)
    for point, r, top in zip(line, at, means + spread, strict=True):
        if point.trainable is not None:
            place: dict[str, Any] = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
            axis.annotate(short_count(point.trainable), (r, top), fontsize=6, color="#555", **place)
    return canvas


def _draw_cells(axis: Any, cells: Any, rows: Sequence[str], columns: Sequence[str], metric: str) -> None:
    """A table with its values written on colors."""
    axis.imshow(cells, cmap="viridis", aspect="auto")
    bright = np.nanmin(cells) + 0.6 * (np.nanmax(cells) - np.nanmin(cells))
    for (row, column), value in np.ndenumerate(cells):
        if not math.isnan(value):
            color = "white" if value < bright else "black"
            axis.text(column, row, _digits(value), ha="center", va="center", fontsize=6.5, color=color)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.set(xlabel="rank r", title=metric)


def matrices(points: Sequence[Point], metric: str) -> Figure:
    """A bar for each set of matrices, with its rank and its number of trained parameters."""
    canvas = figure(PAGE if len(points) > 5 else COLUMN, 2.9)
    axis, (means, spread) = canvas.subplots(), _values(points)
    error = {"elinewidth": 0.8, "capthick": 0.8, "capsize": 2}
    spread_bars = spread if spread.any() else None
    bars = axis.bar(range(len(points)), means, 0.6, color=COLORS[0], yerr=spread_bars, error_kw=error)
    axis.bar_label(bars, [_digits(mean) for mean in means], padding=2, fontsize=7)
    low, high = (means - spread).min(), (means + spread).max()
    room = (high - low) or abs(high) or 1.0
    # Differences between sets are small beside the value itself; the label says that the axis does not begin at zero.
    axis.set_ylim(low - 0.6 * room, high + 0.25 * room)
    labels = []
    for point in points:
        rank = f"r = {point.values[RANK]}" if RANK in point.values else ""
        count = "" if point.trainable is None else short_count(point.trainable)
        labels.append("\n".join(filter(None, [_fold(point.values[MATRICES]), rank, count])))
    axis.set_xticks(range(len(points)), labels)
    axis.set_ylabel(f"{metric} (axis cut)")
    return canvas


def scatter(points: Sequence[Point], key: str, metric: str) -> Figure:
    """Every point by one flag; a number on a logarithmic axis where it spans more than a factor of ten."""
    canvas = figure(COLUMN, 2.8)
    axis, (means, spread) = canvas.subplots(), _values(points)
    numbers = [value for point in points if (value := number(point.values[key])) is not None]
    if len(numbers) < len(points):
        names = list(dict.fromkeys(point.values[key] for point in points))
        numbers = [float(names.index(point.values[key])) for point in points]
        axis.set_xticks(range(len(names)), [_fold(name) for name in names])
    elif min(numbers) > 0 and max(numbers) >= 10 * min(numbers):
        axis.set_xscale("log")
    axis.errorbar(numbers, means, spread if spread.any() else None, fmt="o", ms=4, color=COLORS[0], lw=0.8)
    axis.set(xlabel=key, ylabel=metric)
    return canvas


def halving_curves(decisions: Sequence[Mapping[str, Any]], points: Sequence[Point], metric: str) -> Figure:
    """The metric of each member over the share of the steps, up to where it was dropped."""
    canvas = figure(PAGE, 3.2)
    axis = canvas.subplots()
    for place, point in enumerate(points):
        member = point.trials[0].name
        course = {
            float(Fraction(rung["rung"])): rung["values"][member] for rung in decisions if member in rung["values"]
        }
        dropped_at = next((rung["rung"] for rung in decisions if member in rung["dropped"]), None)
        if dropped_at is None and point.state == "complete" and point.mean is not None:
            course[1.0] = point.mean
        if not course:
            continue
        shares, values = list(course), list(course.values())
        label = point_text(point.values)
        style: dict[str, Any] = {"color": COLORS[place % len(COLORS)], "ls": "-" if place < len(COLORS) else "--"}
        if dropped_at is not None:
            label += f", dropped at {dropped_at}"
            axis.plot(shares[-1:], values[-1:], marker="x", ms=7, mew=1.6, color=style["color"])
        axis.plot(shares, values, marker="o", ms=3, lw=0.9 if dropped_at else 1.8, label=label, **style)
    ticks = {}
    for rung in decisions:
        before, gone = len(rung["values"]), len(rung["dropped"])
        counts = f"{before} members, {before - gone} stay"
        ticks[float(Fraction(rung["rung"]))] = f"{rung['rung']}, {rung['step']} steps\n{counts}"
    ticks[1.0] = "the end"
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.minorticks_off()
    axis.set_ylabel(metric)
    canvas.legend(loc="outside right center", frameon=False)
    return canvas


def _best(points: Sequence[Point], *keys: str) -> list[Point]:
    """The best of the points that agree in these flags, by sets of matrices as the sweep tried them, then by rank."""
    best: dict[tuple[str | None, ...], Point] = {}
    for point in points:  # best first
        best.setdefault(tuple(point.values.get(key) for key in keys), point)
    first: dict[str | None, int] = {}
    for point in sorted(points, key=lambda point: point.trials[0].index):
        first.setdefault(point.values.get(MATRICES), len(first))
    ordered = sorted(best.values(), key=lambda point: float(point.values.get(RANK, 0)))
    return sorted(ordered, key=lambda point: first[point.values.get(MATRICES)])


def _values(points: Sequence[Point]) -> tuple[Any, Any]:
    """Means, and standard deviations between seeds."""
    return np.array([point.mean for point in points], float), np.array([point.sd or 0 for point in points], float)


def _digits(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def _fold(text: str, width: int = 16) -> str:
    """A list of names on several lines; a long dotted name breaks after its dots."""
    folded = textwrap.wrap(readable_value(text).replace(".", ".\u200b "), width, break_long_words=False)
    return "\n".join(folded).replace("\u200b ", "").replace("\u200b", "")
