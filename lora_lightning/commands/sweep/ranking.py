"""Groups trials with the same values into points, and ranks the points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from lora_lightning.commands.sweep.study import State, Trial


@dataclass(frozen=True, kw_only=True)
class Point:
    """Values and their fits, one for each seed."""

    values: dict[str, str]
    trials: list[Trial]

    @property
    def state(self) -> State:
        """`complete` where every fit is: a mean over some seeds is not comparable with one over all."""
        states = {trial.state for trial in self.trials}
        order: tuple[State, ...] = ("failed", "running", "pruned")
        return next((state for state in order if state in states), "complete")

    @property
    def figures(self) -> list[float]:
        """The metric of each fit, where it is finite."""
        return [t.value for t in self.trials if t.value is not None and math.isfinite(t.value)]

    @property
    def mean(self) -> float | None:
        """The mean over seeds; None where a completed fit has no finite metric, as one that diverged."""
        lacks = self.state == "complete" and len(self.figures) < len(self.trials)
        return None if lacks or not self.figures else fmean(self.figures)

    @property
    def deviation(self) -> float | None:
        """The standard deviation between seeds, with n - 1; None for a single one."""
        return stdev(self.figures) if len(self.figures) > 1 else None

    @property
    def trainable(self) -> int | None:
        """Parameters that train."""
        return next((trial.trainable for trial in self.trials if trial.trainable is not None), None)

    @property
    def minutes(self) -> float | None:
        """The mean training time over seeds."""
        minutes = [trial.seconds / 60 for trial in self.trials if trial.seconds is not None]
        return fmean(minutes) if minutes else None

    @property
    def error(self) -> str | None:
        """The error of the first fit that failed."""
        return next((trial.error for trial in self.trials if trial.error), None)


def rank_points(trials: Sequence[Trial], goal: str) -> list[Point]:
    """Points ranked: complete ones by their mean, the best first, then pruned, running and failed ones.

    Of equal means the one that trains fewer parameters is first. Complete points without a finite metric follow
    the other complete ones.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.point, []).append(trial)
    points = [Point(values=dict(values), trials=group) for values, group in groups.items()]
    sign = -1 if goal == "max" else 1

    def place(point: Point) -> tuple[int, float, int]:
        order = ("complete", "pruned", "running", "failed").index(point.state)
        mean = math.inf if point.mean is None else sign * point.mean
        return order, mean, point.trainable or 0

    return sorted(points, key=place)
