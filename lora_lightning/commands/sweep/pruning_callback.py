"""Writes each validation's metrics while a trial trains, for a pruner."""

from __future__ import annotations

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lora_lightning.training.callbacks.run_report import metrics_of
from lora_lightning.training.checkpoints import run_folder as run

FILE = "validations.jsonl"


class ReportValidations(Callback):
    """Adds a line to `validations.jsonl` in the run's folder after each validation: its step and its metrics."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Append a line; a resumed fit may write a step again."""
        folder = run.run_dir(trainer)
        if folder is None or trainer.sanity_checking or not trainer.is_global_zero:
            return
        line = json.dumps({"step": trainer.global_step, **metrics_of(trainer, "val")})
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / FILE).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def reported_values(trial: Path, metric: str) -> list[float]:
    """A metric's values after each validation of a trial's newest run, by step; a step's last line counts."""
    files = sorted(trial.glob(f"version_*/{FILE}"), key=lambda file: file.stat().st_mtime)
    text = files[-1].read_text(encoding="utf-8") if files else ""
    key, by_step = report_key(metric), {}
    for line in text[: text.rfind("\n") + 1].splitlines():
        figures = json.loads(line)
        if key in figures:
            by_step[int(figures["step"])] = float(figures[key])
    return [by_step[step] for step in sorted(by_step)]


def report_key(metric: str) -> str:
    """A metric's name in a run's report and in a line of validations."""
    return metric.replace("/", "_")
