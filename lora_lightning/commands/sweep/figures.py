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
from lora_lightning.commands.sweep.search_space import MATRICES, RANK, number, readable_value, short_names
from lora_lightning.reports.console import short_count
from lora_lightning.reports.figures import COLORS, COLUMN, PAGE, Drawing, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Figures = dict[str, Drawing]
"""By file name."""


def figures(
    points: Sequence[Point],
    keys: Sequence[str],
    metric: str,
    goal: str,
    budget: int | None,
    decisions: Sequence[Mapping[str, Any]] = (),
) -> Figures:
    """The figures that suit the swept flags, of the complete points with a value.

    Args:
        decisions: the content of `halving.json`: the values at each rung, and the members that were dropped.
    """
    done = [point for point in points if point.state == "complete" and point.mean is not None]
    drawings: Figures = {}
    if decisions:
        caption = f"{metric} of each member at the rungs, and its best checkpoint's; a cross is where it was dropped."
        drawings["halving"] = Drawing("Halving", caption, halving_curves(decisions, points, keys, metric))
    if not done:
        return drawings
    others = [key for key in keys if key not in (RANK, MATRICES)]
    note = " Bars: standard deviation between seeds." if any(point.deviation for point in done) else ""
    note += " Of several points with one place the best is shown." if others else ""
    if budget is not None:
        title = "Which matrices, at an equal number of parameters"
        caption = f"Each set at the rank with which nearest to {budget:,} parameters train (the paper's Table 5)."
        drawings["matrices"] = Drawing(title, caption + note, matrices(_best(done, [MATRICES, RANK]), metric))
    elif RANK in keys and MATRICES in keys:
        figure_of = table6(_best(done, [MATRICES, RANK]), metric)
        drawings["rank"] = Drawing("Rank against which matrices", "The paper's Table 6." + note, figure_of)
    elif RANK in keys:
        drawings["rank"] = Drawing("Rank", f"{metric} by r." + note, rank_curve(_best(done, [RANK]), metric))
    elif MATRICES in keys:
        figure_of = matrices(_best(done, [MATRICES]), metric)
        drawings["matrices"] = Drawing("Which matrices", "All at the same rank." + note, figure_of)
    names = short_names(keys)
    for key in others:
        caption = f"{metric} of every point by {key}."
        drawings[names[key].replace(".", "-")] = Drawing(names[key], caption, scatter(done, key, metric))
    return drawings


def rank_curve(points: Sequence[Point], metric: str) -> Figure:
    """The metric over r, with the number of trained parameters beside each point."""
    canvas = figure(COLUMN, 2.8)
    axis = canvas.subplots()
    _draw_line(axis, points, COLORS[0])
    axis.margins(y=0.2)
    for point in points:
        if point.trainable is not None:
            top = (float(point.values[RANK]), _mean(point) + (point.deviation or 0))
            style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 6, "color": "#555"}
            axis.annotate(short_count(point.trainable), top, (0, 6), **style)
    _label_ranks(axis, points)
    axis.set_xlabel("rank r, with the number of parameters that train")
    axis.set_ylabel(metric)
    return canvas


def table6(points: Sequence[Point], metric: str) -> Figure:
    """A line for each set of matrices over r, and beside it the table of means, coloured."""
    canvas = figure(PAGE, 3.1)
    left, right = canvas.subplots(1, 2, width_ratios=[1.1, 1])
    sets, ranks = _sets(points), sorted({int(float(point.values[RANK])) for point in points})
    cells = np.full((len(sets), len(ranks)), np.nan)
    for row, name in enumerate(sets):
        of_set = [point for point in points if point.values[MATRICES] == name]
        _draw_line(left, of_set, COLORS[row % len(COLORS)], readable_value(name))
        for point in of_set:
            cells[row, ranks.index(int(float(point.values[RANK])))] = _mean(point)
    _label_ranks(left, points)
    left.set_xlabel("rank r")
    left.set_ylabel(metric)
    handles, labels = left.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=min(len(sets), 3), frameon=False, handlelength=1.2)
    right.imshow(cells, cmap="viridis", aspect="auto")
    bright = np.nanmin(cells) + 0.6 * (np.nanmax(cells) - np.nanmin(cells))
    for (row, column), value in np.ndenumerate(cells):
        if not math.isnan(value):
            shade = "white" if value < bright else "black"
            right.text(column, row, _digits(value), ha="center", va="center", fontsize=6.5, color=shade)
    right.spines[:].set_visible(False)
    right.tick_params(length=0)
    right.set_xticks(range(len(ranks)), [str(r) for r in ranks])
    right.set_yticks(range(len(sets)), [_fold(name) for name in sets])
    right.set_xlabel("rank r")
    right.set_title(metric)
    return canvas


def matrices(points: Sequence[Point], metric: str) -> Figure:
    """A bar for each set of matrices, with its rank and its number of trained parameters."""
    by_set = {point.values[MATRICES]: point for point in points}
    ordered = [by_set[name] for name in _sets(points)]
    canvas = figure(PAGE if len(ordered) > 5 else COLUMN, 2.9)
    axis = canvas.subplots()
    means = np.array([_mean(point) for point in ordered])
    spread = np.array([point.deviation or 0.0 for point in ordered])
    error = {"elinewidth": 0.8, "capthick": 0.8, "capsize": 2}
    axis.bar(range(len(ordered)), means, 0.6, color=COLORS[0], yerr=spread if spread.any() else None, error_kw=error)
    low, high = (means - spread).min(), (means + spread).max()
    room = (high - low) or abs(high) or 1.0
    # Differences between sets are small beside the value itself; the label says that the axis does not begin at zero.
    axis.set_ylim(low - 0.6 * room, high + 0.25 * room)
    for place, (mean, deviation) in enumerate(zip(means, spread, strict=True)):
        axis.text(place, mean + deviation + 0.03 * room, _digits(mean), ha="center", fontsize=7)
    axis.set_xticks(range(len(ordered)), [_bar_label(point) for point in ordered])
    axis.set_ylabel(f"{metric} (axis cut)")
    return canvas


def scatter(points: Sequence[Point], key: str, metric: str) -> Figure:
    """Every point by one flag; a number on a logarithmic axis where it spans more than a factor of ten."""
    canvas = figure(COLUMN, 2.8)
    axis = canvas.subplots()
    numbers = [value for point in points if (value := number(point.values[key])) is not None]
    if len(numbers) < len(points):
        names = list(dict.fromkeys(point.values[key] for point in points))
        numbers = [float(names.index(point.values[key])) for point in points]
        axis.set_xticks(range(len(names)), [_fold(name) for name in names])
    elif min(numbers) > 0 and max(numbers) >= 10 * min(numbers):
        axis.set_xscale("log")
    means = [_mean(point) for point in points]
    axis.errorbar(numbers, means, _deviations(points), fmt="o", ms=4, color=COLORS[0], lw=0.8)
    axis.set_xlabel(key)
    axis.set_ylabel(metric)
    return canvas


def halving_curves(
    decisions: Sequence[Mapping[str, Any]], points: Sequence[Point], keys: Sequence[str], metric: str
) -> Figure:
    """The metric of each member over the share of the steps, up to where it was dropped."""
    canvas = figure(PAGE, 3.2)
    axis = canvas.subplots()
    shares = [float(Fraction(decision["rung"])) for decision in decisions]
    names = short_names(keys)
    for place, point in enumerate(points):
        (trial,) = point.trials
        values = [decision["values"].get(trial.name) for decision in decisions]
        reached = [(share, value) for share, value in zip(shares, values, strict=True) if value is not None]
        dropped_at = next((decision["rung"] for decision in decisions if trial.name in decision["dropped"]), None)
        if dropped_at is None and point.state == "complete" and point.mean is not None:
            reached.append((1.0, point.mean))
        if not reached:
            continue
        label = ", ".join(f"{names[key]} = {readable_value(value)}" for key, value in point.values.items())
        style: dict[str, Any] = {"color": COLORS[place % len(COLORS)], "ls": "-" if place < len(COLORS) else "--"}
        label += "" if dropped_at is None else f", dropped at {dropped_at}"
        axis.plot(*zip(*reached, strict=True), marker="o", ms=3, lw=0.9 if dropped_at else 1.8, label=label, **style)
        if dropped_at is not None:
            axis.plot(*reached[-1], marker="x", ms=7, mew=1.6, color=style["color"])
    axis.set_xscale("log", base=2)
    counts = [(len(decision["values"]), len(decision["dropped"])) for decision in decisions]
    ticks = [
        f"{decision['rung']}, {decision['step']} steps\n{before} members, {before - gone} stay"
        for decision, (before, gone) in zip(decisions, counts, strict=True)
    ]
    axis.set_xticks([*shares, 1.0], [*ticks, "the end"])
    axis.minorticks_off()
    axis.set_ylabel(metric)
    canvas.legend(loc="outside right center", frameon=False)
    return canvas


def _best(points: Sequence[Point], keys: Sequence[str]) -> list[Point]:
    """The best of the points that agree in these flags, in the order of the flags' numbers, else of the sweep."""
    best: dict[tuple[str, ...], Point] = {}
    for point in points:  # best first
        best.setdefault(tuple(point.values.get(key, "") for key in keys), point)

    def place(point: Point) -> tuple[float, ...]:
        numbers = [number(point.values.get(key, "")) for key in keys]
        return *(math.inf if value is None else value for value in numbers), _index(point)

    return sorted(best.values(), key=place)


def _sets(points: Sequence[Point]) -> list[str]:
    """Sets of matrices in the order in which the sweep tried them."""
    return list(dict.fromkeys(point.values[MATRICES] for point in sorted(points, key=_index)))


def _index(point: Point) -> int:
    return min(trial.index for trial in point.trials)


def _mean(point: Point) -> float:
    assert point.mean is not None
    return point.mean


def _deviations(points: Sequence[Point]) -> list[float] | None:
    spread = [point.deviation or 0.0 for point in points]
    return spread if any(spread) else None


def _draw_line(axis: Any, points: Sequence[Point], colour: str, label: str = "") -> None:
    ordered = sorted(points, key=lambda point: float(point.values[RANK]))
    ranks, means = [float(point.values[RANK]) for point in ordered], [_mean(point) for point in ordered]
    style = {"marker": "o", "markersize": 3.5, "linewidth": 1.4, "elinewidth": 0.8, "capsize": 2}
    axis.errorbar(ranks, means, _deviations(ordered), color=colour, label=label, **style)


def _label_ranks(axis: Any, points: Sequence[Point]) -> None:
    """Ranks are tried in powers of two; those that were tried are the ticks."""
    ranks = sorted({float(point.values[RANK]) for point in points})
    if ranks[0] > 0:
        axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [f"{r:g}" for r in ranks])
    axis.minorticks_off()


def _bar_label(point: Point) -> str:
    lines = [_fold(point.values[MATRICES])]
    lines += [f"r = {point.values[RANK]}"] if RANK in point.values else []
    lines += [short_count(point.trainable)] if point.trainable is not None else []
    return "\n".join(lines)


def _digits(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def _fold(text: str, width: int = 16) -> str:
    """A list of names on several lines; a long dotted name breaks after its dots."""
    folded = textwrap.wrap(readable_value(text).replace(".", ".\u200b "), width, break_long_words=False)
    return "\n".join(folded).replace("\u200b ", "").replace("\u200b", "")
