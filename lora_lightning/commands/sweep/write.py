"""A sweep's files: `sweep.json`, `sweep.csv`, the figures, and `index.html`, which shows them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_lightning.analysis import drawing
from lora_lightning.analysis.page import page
from lora_lightning.commands.sweep.plots import figures
from lora_lightning.commands.sweep.ranking import Point
from lora_lightning.commands.sweep.tables import csv_of, table
from lora_lightning.lora.formats.atomic_dir import write_bytes

RESULTS, CSV, PAGE = "sweep.json", "sweep.csv", "index.html"
TITLE = "A sweep"
INTRO = """Fits of one config with other values of some flags, ranked by what their best checkpoints reached on the
validation set. Of many figures the best is a little lucky, more so the more there are: the test set, on which no fit
of the sweep was measured, tells what the chosen one is worth."""


def write(
    folder: Path,
    about: dict[str, Any],
    points: Sequence[Point],
    keys: Sequence[str],
    *,
    plots: bool,
) -> None:
    """All of it; figures of an earlier state that there are no more of are taken away.

    Args:
        about: what `sweep.json` begins with: the metric, its goal, the budget, the config.
    """
    metric, goal = about["metric"], about["goal"]
    files: dict[str, bytes] = {}
    shown: dict[str, tuple[str, bytes]] = {}
    if plots:
        with drawing.styled():
            for name, (title, caption, figure) in figures(points, keys, metric, goal, about["budget"]).items():
                pictures = drawing.files_of(figure)
                files |= {f"{name}.{ending}": data for ending, data in pictures.items()}
                shown[title] = (caption, pictures["svg"])
    ranking = [
        {
            "place": place,
            "values": point.values,
            "state": point.state,
            "mean": point.mean,
            "sd": point.deviation,
            "trainable": point.trainable,
            "minutes": point.minutes,
            "trials": [asdict(trial) for trial in point.trials],
        }
        for place, point in enumerate(points, 1)
    ]
    _clear(folder, keep=files)
    told = {**about, "keys": list(keys), "ranking": ranking, "pictures": sorted(files)}
    write_bytes(folder / RESULTS, (json.dumps(told, indent=2) + "\n").encode())
    write_bytes(folder / CSV, csv_of(points, keys, metric).encode())
    for name, data in files.items():
        write_bytes(folder / name, data)
    rows = table(folder.name, points, keys, metric, goal)
    write_bytes(folder / PAGE, page([rows], [], shown, title=TITLE, intro=INTRO))


def read(folder: Path) -> dict[str, Any]:
    """What `sweep.json` says; nothing where there is none that can be read."""
    try:
        found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _clear(folder: Path, keep: dict[str, bytes]) -> None:
    for name in read(folder).get("pictures", []):
        if name not in keep and name == Path(str(name)).name and name.endswith(drawing.ENDINGS):
            (folder / name).unlink(missing_ok=True)
