"""Trials with the same values as one point, and points in their order, the best first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from lora_lightning.commands.sweep.study import State, Trial


@dataclass(frozen=True, kw_only=True)
class Point:
    """Values and what their fits, one for each seed, came to."""

    values: dict[str, str]
    trials: list[Trial]

    @property
    def state(self) -> State:
        """`complete` where every fit is: the mean over some seeds would be beside the mean over all."""
        states = {trial.state for trial in self.trials}
        order: tuple[State, ...] = ("failed", "running", "pruned")
        return next((state for state in order if state in states), "complete")

    @property
    def figures(self) -> list[float]:
        """The metric of each fit that has one and is a number."""
        return [t.value for t in self.trials if t.value is not None and math.isfinite(t.value)]

    @property
    def mean(self) -> float | None:
        """Over seeds."""
        return fmean(self.figures) if self.figures else None

    @property
    def deviation(self) -> float | None:
        """Between seeds, with n - 1; None of a single one."""
        return stdev(self.figures) if len(self.figures) > 1 else None

    @property
    def trainable(self) -> int | None:
        """Parameters that train."""
        return next((trial.trainable for trial in self.trials if trial.trainable is not None), None)

    @property
    def minutes(self) -> float | None:
        """Of training, the mean over seeds."""
        durations = [trial.seconds / 60 for trial in self.trials if trial.seconds is not None]
        return fmean(durations) if durations else None

    @property
    def error(self) -> str | None:
        """What a fit failed of."""
        return next((trial.error for trial in self.trials if trial.error), None)


def rank_points(trials: Sequence[Trial], goal: str) -> list[Point]:
    """Complete points by their mean, the best first and of equals the one that trains less; then what was pruned, what
    still runs and what failed. A point that is complete with no figure, since its loss became infinite, is the last of
    the complete."""
    groups: dict[tuple[tuple[str, str], ...], list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.point, []).append(trial)
    points = [Point(values=dict(values), trials=members) for values, members in groups.items()]
    sign = -1 if goal == "max" else 1

    def place(point: Point) -> tuple[int, float, int]:
        order = ("complete", "pruned", "running", "failed").index(point.state)
        mean = math.inf if point.mean is None else sign * point.mean
        return order, mean, point.trainable or 0

    return sorted(points, key=place)
