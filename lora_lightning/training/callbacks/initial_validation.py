"""The frozen base's metrics, for comparison with the trained model's."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from lora_lightning.reports.console import BEFORE
from lora_lightning.training.callbacks.run_report import metrics_of
from lora_lightning.training.checkpoints import run_folder as run


class MeasureBefore(Callback):
    """Validates once before the first step: a fresh adapter changes nothing (law 1), so this measures the base.

    Lightning's sanity check then runs over all of the validation set. Each metric goes to the run's report and to its
    loggers as `val_..._before`. A resumed fit has no fresh adapter and measures nothing.
    """

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.figures = {}
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.num_sanity_val_steps = float("inf")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of the sanity check, which Lightning drops."""
        if trainer.sanity_checking:
            self.figures = {f"{name}{BEFORE}": value for name, value in metrics_of(trainer, "val").items()}

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log them before training starts."""
        if not self.figures or not trainer.is_global_zero:
            return
        text = ", ".join(f"{name[4 : -len(BEFORE)].replace('_', ' ')} {x:.4f}" for name, x in self.figures.items())
        Console().print(f"before training: {text}", soft_wrap=True)
        for logger in trainer.loggers:
            logger.log_metrics({name.replace("_", "/", 1): x for name, x in self.figures.items()}, step=0)
        if (folder := run.run_dir(trainer)) is not None:
            run.update_report(folder, self.figures)
