"""A sweep's ranked points as a table, a CSV file, `sweep.json`, and a page with the figures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_lightning.commands.sweep.figures import figures
from lora_lightning.commands.sweep.ranking import Point
from lora_lightning.commands.sweep.search_space import readable_value, short_names
from lora_lightning.lora.formats.atomic_dir import write_bytes
from lora_lightning.reports.figures import ENDINGS, write_figures
from lora_lightning.reports.html import figure_sections, page, table_section
from lora_lightning.reports.table import Table
from lora_lightning.training.population.population import DECISIONS

RESULTS, CSV, PAGE = "sweep.json", "sweep.csv", "index.html"
NOT_TEST = "ranked by validation, by each run's best checkpoint; the test set was not used, so that it can still judge"
INTRO = """Fits of one config with other values of some flags, ranked by what their best checkpoints reached on the
validation set. Of many figures the best is a little lucky, more so the more there are: the test set, on which no fit
of the sweep was measured, tells what the chosen one is worth."""


def table(name: str, points: Sequence[Point], keys: Sequence[str], metric: str, goal: str) -> Table:
    """A row for each point, the best first."""
    names = short_names(keys)
    repeated = any(len(point.trials) > 1 for point in points)
    header = ["", *(names[key] for key in keys), metric, *(["sd", "n"] if repeated else [])]
    rows = []
    for place, point in enumerate(points, 1):
        count = sum(trial.value is not None for trial in point.trials)
        rows.append(
            [
                str(place) if point.state == "complete" else point.state,
                *(readable_value(point.values[key]) for key in keys),
                _figure(point.mean),
                *([_figure(point.sd), str(count)] if repeated else []),
                "-" if point.trainable is None else f"{point.trainable:,}",
                "-" if point.minutes is None else f"{point.minutes:.1f}",
                point.trials[0].name,
            ]
        )
    below = [f"{NOT_TEST}; the {'largest' if goal == 'max' else 'smallest'} {metric} is the best"]
    below += [f"{trial.name} failed: {trial.error}" for point in points for trial in point.trials if trial.error]
    header += ["trainable", "minutes", "folder"]
    return Table(title=name, header=header, rows=rows, text=range(1 + len(keys)), note="\n".join(below))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or not value else f"{value:.3g}"


def csv_of(points: Sequence[Point], keys: Sequence[str], metric: str) -> str:
    """A row for each fit, with its point's place and mean."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["place", *keys, "seed", "state", metric, "mean", "sd", "trainable", "seconds", "run", "error"])
    for place, point in enumerate(points, 1):
        for t in point.trials:
            cells = [t.value, point.mean, point.sd, t.trainable, t.seconds, t.run, t.error]
            writer.writerow([place, *(point.values[key] for key in keys), t.seed, t.state, *cells])
    return text.getvalue()


def write(folder: Path, about: Mapping[str, Any], points: Sequence[Point], *, plots: bool) -> None:
    """Write all files; figures of an earlier state are removed.

    Args:
        about: the beginning of `sweep.json`: the metric, its goal, the budget, the flags (`keys`), the config.
    """
    metric, goal, keys = about["metric"], about["goal"], about["keys"]
    decisions = _read(folder / DECISIONS) or []
    drawings = figures(points, keys, metric, about["budget"], decisions) if plots else {}
    svgs = write_figures(folder, drawings, earlier=(_read(folder / RESULTS) or {}).get("pictures"))
    ranking = [{"place": place, **asdict(point)} for place, point in enumerate(points, 1)]
    pictures = sorted(f"{name}.{ending}" for name in drawings for ending in ENDINGS)
    content = {**about, "ranking": ranking, "pictures": pictures}
    write_bytes(folder / RESULTS, (json.dumps(content, indent=2) + "\n").encode())
    write_bytes(folder / CSV, csv_of(points, keys, metric).encode())
    sections = [table_section(table(folder.name, points, keys, metric, goal)), *figure_sections(drawings, svgs)]
    write_bytes(folder / PAGE, page("A sweep", INTRO, sections).encode())


def about_of(folder: Path) -> dict[str, Any] | None:
    """What the sweep that wrote into this folder is about; None where none did."""
    results = _read(folder / RESULTS)
    return results and {key: results[key] for key in results if key not in ("seeds", "ranking", "pictures")}


def _read(file: Path) -> Any:
    """The content of a JSON file; None where it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
