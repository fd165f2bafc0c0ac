"""A sweep as a table, for the screen, the page and the CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from lora_lightning.analysis.tables import Rows
from lora_lightning.commands.sweep.ranking import Point
from lora_lightning.commands.sweep.search_space import plainly, short_names

NOT_TEST = "ranked by validation, by each run's best checkpoint; the test set was not used, so that it can still judge"


def table(name: str, points: Sequence[Point], keys: Sequence[str], metric: str, goal: str) -> Rows:
    """A row for each point, the best first."""
    names = short_names(keys)
    repeated = any(len(point.trials) > 1 for point in points)
    deviation = ["sd", "n"] if repeated else []
    header = ["", *(names[key] for key in keys), metric, *deviation, "trainable", "minutes", "folder"]
    rows = []
    for place, point in enumerate(points, 1):
        cells = [str(place) if point.state == "complete" else point.state]
        cells += [plainly(point.values[key]) for key in keys]
        cells += [_figure(point.mean)]
        cells += [_figure(point.deviation), str(len(point.figures))] if repeated else []
        cells += ["-" if point.trainable is None else f"{point.trainable:,}"]
        cells += ["-" if point.minutes is None else f"{point.minutes:.1f}", point.trials[0].name]
        rows.append(cells)
    best = "largest" if goal == "max" else "smallest"
    below = [f"{NOT_TEST}; the {best} {metric} is the best", *_faults(points)]
    return Rows(name, header, rows, "\n".join(below))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or not value else f"{value:.3g}"


def _faults(points: Sequence[Point]) -> list[str]:
    return [f"{trial.name} failed: {trial.error}" for point in points for trial in point.trials if trial.error]


def next_command(points: Sequence[Point]) -> str:
    """What is to be done with the best."""
    best = next((trial for point in points[:1] for trial in point.trials if trial.run), None)
    return "" if best is None else f"lora-lightning test --ckpt_path {best.run}"


def csv_of(points: Sequence[Point], keys: Sequence[str], metric: str) -> str:
    """A row for each fit, with its point's place and mean."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["place", *keys, "seed", "state", metric, "mean", "sd", "trainable", "seconds", "run", "error"])
    for place, point in enumerate(points, 1):
        for t in point.trials:
            own = [t.value, point.mean, point.deviation, t.trainable, t.seconds, t.run, t.error]
            writer.writerow([place, *(point.values[key] for key in keys), t.seed, t.state, *map(_empty, own)])
    return text.getvalue()


def _empty(value: object) -> object:
    return "" if value is None else value
