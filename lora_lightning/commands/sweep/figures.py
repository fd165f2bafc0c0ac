"""The figures of a sweep: the paper's Table 6 (rank against which matrices), its Table 5 (which matrices at an equal
number of parameters), and the metric against any other flag."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_lightning.analysis.drawing import COLOURS, figure
from lora_lightning.commands.sweep.ranking import Point
from lora_lightning.commands.sweep.search_space import MATRICES, RANK, number, plainly, short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, COLUMN = 6.8, 4.4
"""Inches of a page's width, and of a figure with one panel."""
Drawn = dict[str, tuple[str, str, "Figure"]]
"""By file name: title, caption, figure."""


def figures(points: Sequence[Point], keys: Sequence[str], metric: str, goal: str, budget: int | None) -> Drawn:
    """Those that these flags make, of the points that have a figure."""
    found = [point for point in points if point.state == "complete" and point.mean is not None]
    drawn: Drawn = {}
    if not found:
        return drawn
    others = [key for key in keys if key not in (RANK, MATRICES)]
    note = " Of several points with one place the best is shown." if others else ""
    bars = " Bars: standard deviation between seeds." if any(point.deviation for point in found) else ""
    if budget is not None:
        title = "Which matrices, at an equal number of parameters"
        caption = f"Each set at the rank with which nearest to {budget:,} parameters train (the paper's Table 5).{bars}"
        drawn["matrices"] = title, caption + note, matrices(_best(found, [MATRICES, RANK], goal), metric)
    elif RANK in keys and MATRICES in keys:
        title = "Rank against which matrices"
        drawn["rank"] = title, f"The paper's Table 6.{bars}{note}", table6(_best(found, [MATRICES, RANK], goal), metric)
    elif RANK in keys:
        drawn["rank"] = "Rank", f"{metric} by r.{bars}{note}", curve(_best(found, [RANK], goal), RANK, metric)
    elif MATRICES in keys:
        own = matrices(_best(found, [MATRICES], goal), metric)
        drawn["matrices"] = "Which matrices", f"All at the same rank.{bars}{note}", own
    names = short_names(keys)
    for key in others:
        drawn[names[key].replace(".", "-")] = (
            names[key],
            f"{metric} of every point by {key}.",
            scatter(found, key, metric),
        )
    return drawn


def _best(points: Sequence[Point], keys: Sequence[str], goal: str) -> list[Point]:
    """Of points that agree in these flags the best, in the order of the flags' numbers, else of the sweep."""
    best: dict[tuple[str, ...], Point] = {}
    for point in points:  # the best come first
        best.setdefault(tuple(point.values.get(key, "") for key in keys), point)
    return sorted(best.values(), key=lambda point: _order(point, keys))


def _order(point: Point, keys: Sequence[str]) -> tuple[float, ...]:
    order = [number(point.values.get(key, "")) for key in keys]
    return *(math.inf if value is None else value for value in order), min(t.index for t in point.trials)


def _r(point: Point) -> int:
    return int(float(point.values[RANK]))


def _mean(point: Point) -> float:
    assert point.mean is not None
    return point.mean


def _sets(points: Sequence[Point]) -> list[str]:
    """In the order in which the sweep tried them."""
    by_number = sorted(points, key=lambda point: min(t.index for t in point.trials))
    return list(dict.fromkeys(point.values[MATRICES] for point in by_number))


def curve(points: Sequence[Point], key: str, metric: str) -> Figure:
    """The metric over a number, with what trains written at each point."""
    drawn = figure(COLUMN, 2.8)
    axis = drawn.subplots()
    _line(axis, points, COLOURS[0], "", key)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.18 * (high - low))
    for point in points:
        if point.trainable is not None:
            place = (float(point.values[key]), _mean(point) + (point.deviation or 0))
            axis.annotate(
                _millions(point.trainable),
                place,
                (0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=6,
                color="#555",
            )
    _log_ranks(axis, points, key)
    axis.set_xlabel("rank r, with the number of parameters that train" if key == RANK else key)
    axis.set_ylabel(metric)
    return drawn


def table6(points: Sequence[Point], metric: str) -> Figure:
    """A line for each set of matrices over r, and the same as a table of colours."""
    drawn = figure(PAGE, 3.1)
    left, right = drawn.subplots(1, 2, width_ratios=[1.1, 1])
    sets, ranks = _sets(points), sorted({_r(point) for point in points})
    for place, name in enumerate(sets):
        own = [point for point in points if point.values[MATRICES] == name]
        _line(left, own, COLOURS[place % len(COLOURS)], plainly(name), RANK)
    _log_ranks(left, points, RANK)
    left.set_xlabel("rank r")
    left.set_ylabel(metric)
    handles, labels = left.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(len(sets), 3), frameon=False, handlelength=1.2)
    cells = np.full((len(sets), len(ranks)), np.nan)
    for point in points:
        cells[sets.index(point.values[MATRICES]), ranks.index(_r(point))] = _mean(point)
    _coloured(right, cells)
    right.set_xticks(range(len(ranks)), [str(r) for r in ranks])
    right.set_yticks(range(len(sets)), [_folded(plainly(name)) for name in sets])
    right.set_xlabel("rank r")
    right.set_title(metric)
    return drawn


def _coloured(axis: Any, cells: np.ndarray) -> None:
    axis.imshow(cells, cmap="viridis", aspect="auto")
    low, high = np.nanmin(cells), np.nanmax(cells)
    for (row, column), value in np.ndenumerate(cells):
        if not math.isnan(value):
            shade = "white" if value < low + 0.6 * (high - low) else "black"
            axis.text(column, row, _digits(value), ha="center", va="center", fontsize=6.5, color=shade)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def matrices(points: Sequence[Point], metric: str) -> Figure:
    """A bar for each set of matrices, with its rank and what trains."""
    sets = _sets(points)
    by_set = {point.values[MATRICES]: point for point in points}
    ordered = [by_set[name] for name in sets]
    drawn = figure(PAGE if len(sets) > 5 else COLUMN, 2.9)
    axis = drawn.subplots()
    means = [_mean(point) for point in ordered]
    spread = [point.deviation or 0.0 for point in ordered]
    repeated = any(spread)
    bars: dict[str, Any] = (
        {"yerr": spread, "error_kw": {"elinewidth": 0.8, "capthick": 0.8, "capsize": 2}} if repeated else {}
    )
    axis.bar(range(len(sets)), means, 0.6, color=COLOURS[0], **bars)
    low = min(mean - s for mean, s in zip(means, spread, strict=True))
    high = max(mean + s for mean, s in zip(means, spread, strict=True))
    room = (high - low) or abs(high) or 1.0
    # Differences between sets are small beside the figure itself; the axis says where it begins.
    axis.set_ylim(low - 0.6 * room, high + 0.25 * room)
    for place, (mean, s) in enumerate(zip(means, spread, strict=True)):
        axis.text(place, mean + s + 0.03 * room, _digits(mean), ha="center", fontsize=7)
    axis.set_xticks(range(len(sets)), [_tick(point) for point in ordered])
    axis.set_ylabel(f"{metric} (axis cut)")
    return drawn


def _tick(point: Point) -> str:
    lines = [_folded(plainly(point.values[MATRICES]))]
    lines += [f"r = {point.values[RANK]}"] if RANK in point.values else []
    lines += [_millions(point.trainable)] if point.trainable is not None else []
    return "\n".join(lines)


def scatter(points: Sequence[Point], key: str, metric: str) -> Figure:
    """Every point by one flag; a number on a logarithmic axis where it spans more than a factor of ten."""
    drawn = figure(COLUMN, 2.8)
    axis = drawn.subplots()
    numbers = [number(point.values[key]) for point in points]
    own = [value for value in numbers if value is not None]
    if len(own) < len(points):
        names = list(dict.fromkeys(point.values[key] for point in points))
        own = [float(names.index(point.values[key])) for point in points]
        axis.set_xticks(range(len(names)), [_folded(plainly(name)) for name in names])
    elif min(own) > 0 and max(own) >= 10 * min(own):
        axis.set_xscale("log")
    spread = [point.deviation or 0.0 for point in points]
    axis.errorbar(
        own, [_mean(p) for p in points], spread if any(spread) else None, fmt="o", ms=4, color=COLOURS[0], lw=0.8
    )
    axis.set_xlabel(key)
    axis.set_ylabel(metric)
    return drawn


def _line(axis: Any, points: Sequence[Point], colour: str, label: str, key: str) -> None:
    own = sorted(points, key=lambda point: float(point.values[key]))
    spread = [point.deviation or 0.0 for point in own]
    axis.errorbar(
        [float(point.values[key]) for point in own],
        [_mean(point) for point in own],
        spread if any(spread) else None,
        color=colour,
        label=label,
        marker="o",
        markersize=3.5,
        linewidth=1.4,
        elinewidth=0.8,
        capsize=2,
    )


def _log_ranks(axis: Any, points: Sequence[Point], key: str) -> None:
    """Ranks are tried in powers of two; those that were are the ticks."""
    ranks = sorted({float(point.values[key]) for point in points})
    if ranks[0] > 0:
        axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [f"{r:g}" for r in ranks])
    axis.minorticks_off()


def _digits(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count / 1e3:.0f}k" if count >= 1e3 else str(count)


def _folded(text: str, width: int = 16) -> str:
    """A list of names on as many lines as it takes, long dotted ones on several."""
    lines = [""]
    for piece in re.findall(r"[^., ]+(?:\.|, )?|[., ]+", text):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)
