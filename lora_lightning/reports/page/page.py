"""`report.html` of a run, made anew from the files in the run's folder whenever one of them has changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_lightning.lora.formats.atomic_dir import write_bytes
from lora_lightning.reports.page import parts
from lora_lightning.reports.page.markup import Markup, joined, tag
from lora_lightning.reports.page.series import read_metrics
from lora_lightning.reports.page.style import STYLE
from lora_lightning.training.checkpoints import run_folder as run

SAMPLES, METRICS = "samples.jsonl", "metrics.csv"


def write_page(folder: Path) -> Path:
    """Write the page of the run in `folder`; returns the file."""
    file = folder / run.PAGE
    write_bytes(file, page_of(folder).encode())
    return file


def page_of(folder: Path) -> str:
    """The page as text, from `report.json`, `metrics.csv`, `samples.jsonl` and `config.yaml`, where they are there."""
    facts = json.loads(_text(folder / run.REPORT) or "{}")
    numbered = folder.name.startswith("version_")
    name, version = (folder.parent.name, folder.name) if numbered else (folder.name, "")
    body = joined(
        parts.head(facts, name, version),
        parts.cards(facts),
        parts.curves(facts, read_metrics(folder / METRICS)),
        parts.adapted(facts),
        parts.answers(_lines(folder / SAMPLES)),
        parts.facts(facts),
        parts.config(_text(folder / run.CONFIG)),
        tag("footer", f"Made by lora_lightning from the files in {folder}."),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{name} {version}".strip()),
        tag("style", Markup(STYLE)),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", tag("main", body)), lang="en") + "\n"


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _text(file).splitlines() if line.strip()]
