"""What a trial tells while it trains: each validation's figures, for a pruner that reads them."""

from __future__ import annotations

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lora_lightning.training.callbacks.run_report import metrics_of
from lora_lightning.training.checkpoints import run_folder as run

FILE = "validations.jsonl"


class ReportValidations(Callback):
    """Adds a line to `validations.jsonl` in the run's folder after each validation: its step and its figures."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A fit that goes on from a checkpoint may write a step again."""
        folder = run.run_dir(trainer)
        if folder is None or trainer.sanity_checking or not trainer.is_global_zero:
            return
        line = json.dumps({"step": trainer.global_step, **metrics_of(trainer, "val")})
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / FILE).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def reported_values(trial: Path, metric: str) -> list[float]:
    """A metric after each validation of a trial's newest run, by step; a step's last line counts."""
    files = sorted(trial.glob(f"version_*/{FILE}"), key=lambda file: file.stat().st_mtime)
    if not files:
        return []
    text = files[-1].read_text(encoding="utf-8")
    value_at: dict[int, float] = {}
    for line in text[: text.rfind("\n") + 1].splitlines():
        figures = json.loads(line)
        if metric in figures:
            value_at[int(figures["step"])] = float(figures[metric])
    return [value_at[step] for step in sorted(value_at)]
