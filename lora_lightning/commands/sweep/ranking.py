"""Groups trials with the same values into points, and ranks the points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from lora_lightning.commands.sweep.search_space import Values
from lora_lightning.commands.sweep.study import State, Trial

ORDER: tuple[State, ...] = ("complete", "pruned", "running", "failed")


@dataclass(frozen=True, kw_only=True)
class Point:
    """A combination of values and its fits, one for each seed."""

    values: Values
    state: State
    """`complete` where every fit is: a mean over some seeds is not comparable with one over all."""
    mean: float | None
    """The mean over seeds; None where a completed fit has no finite metric, as one that diverged."""
    sd: float | None
    """The standard deviation between seeds, with n - 1; None for a single one."""
    trainable: int | None
    """Parameters that train."""
    minutes: float | None
    """The mean training time over seeds."""
    trials: list[Trial]


def rank_points(trials: Sequence[Trial], goal: str) -> list[Point]:
    """Points ranked: complete ones by their mean, the best first, then pruned, running and failed ones.

    Of equal means the one that trains fewer parameters is first. Complete points without a finite metric follow
    the other complete ones.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Trial]] = {}
    for trial in trials:
        groups.setdefault(tuple(trial.values.items()), []).append(trial)
    sign = -1 if goal == "max" else 1

    def place(point: Point) -> tuple[int, float, int]:
        return ORDER.index(point.state), math.inf if point.mean is None else sign * point.mean, point.trainable or 0

    return sorted(map(_point, groups.values()), key=place)


def _point(trials: list[Trial]) -> Point:
    state = max((trial.state for trial in trials), key=ORDER.index)
    metrics = [trial.value for trial in trials if trial.value is not None and math.isfinite(trial.value)]
    minutes = [trial.seconds / 60 for trial in trials if trial.seconds is not None]
    comparable = metrics and (state != "complete" or len(metrics) == len(trials))
    return Point(
        values=trials[0].values,
        state=state,
        mean=fmean(metrics) if comparable else None,
        sd=stdev(metrics) if len(metrics) > 1 else None,
        trainable=next((trial.trainable for trial in trials if trial.trainable is not None), None),
        minutes=fmean(minutes) if minutes else None,
        trials=trials,
    )
