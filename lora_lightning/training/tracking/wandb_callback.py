"""W&B's part of a run that figures alone are not: tables, the summary, and the adapter and the export as artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.tensor import DTensor

from lora_lightning.lora.frozen.tensors import adapter_bytes
from lora_lightning.training.callbacks.export_on_fit_end import best_in
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.tracking import wandb_run
from lora_lightning.training.tracking.prediction_table import prediction_table


class Tracking(Callback):
    """Does nothing where the run does not log to W&B; the command puts it behind all other callbacks.

    The run's config and summary get the counts and the adapter's size, and in the end what `report.json` says. Tables:
    `injection`, a row for each adapted module, and `predictions` on the first validation rows. Artifacts, linked to the
    run: `adapter-ID:best` and `adapter-ID:latest` (one version where the last state is the best) as PEFT reads them,
    each with report, page and config, and `export-ID` where the fit exported. Files above 2 GB are not uploaded; the
    artifact says where they lie.

    Args:
        predictions: rows of the table of predictions; 0 for none.
        artifacts: whether adapters and exports become artifacts.
    """

    def __init__(self, predictions: int = 16, artifacts: bool = True) -> None:
        self.predictions, self.artifacts = predictions, artifacts

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what trains."""
        if trainer.is_global_zero and isinstance(pl_module, LoRAModule):
            wandb_run.log_start(trainer, pl_module.report, adapter_bytes(pl_module.backbone))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Every process predicts, since a sharded model needs them all; the first one logs."""
        loggers = self._loggers(trainer)
        if not self.predictions or not loggers or not isinstance(pl_module, LoRAModule):
            return
        found = prediction_table(trainer, pl_module, self.predictions)
        if found is not None:
            for logger in loggers:
                logger.log_table("predictions", columns=found[0], data=found[1], step=trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The report's values, and what the run made."""
        folder = run.run_dir(trainer)
        loggers = self._loggers(trainer)
        if folder is None or not loggers or not trainer.is_global_zero or not isinstance(pl_module, LoRAModule):
            return
        report = wandb_run.log_report(loggers, folder)
        if self.artifacts:
            self._log_adapters(trainer, pl_module, folder)
            if exported := [report[key] for key in ("adapter_dir", "merged_dir") if report.get(key)]:
                wandb_run.log_export(loggers, folder, Path(exported[0]).parent)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The test's figures, in the summary of the run that was tested."""
        if trainer.is_global_zero and trainer.ckpt_path and (folder := run.test_dir(trainer)) is not None:
            wandb_run.log_report(self._loggers(trainer), folder)

    @staticmethod
    def _loggers(trainer: Trainer) -> list[Any]:
        return [] if trainer.fast_dev_run else wandb_run.wandb_loggers(trainer.loggers)  # type: ignore[attr-defined]

    def _log_adapters(self, trainer: Trainer, module: LoRAModule, folder: Path) -> None:
        """The best first: W&B gives `latest` to what is logged last."""
        loggers, kept = self._loggers(trainer), trainer.checkpoint_callback
        best = kept.best_model_path if isinstance(kept, ModelCheckpoint) else ""
        if is_in_parts(module):
            if best and Path(best).exists():
                wandb_run.log_checkpoint(loggers, Path(best), folder, ["best", "latest"])
            return
        task = module.task.peft_task_type
        with best_in(trainer, module) as is_last:
            wandb_run.log_adapter(loggers, module.backbone, folder, ["best", "latest"] if is_last else ["best"], task)
        if not is_last:
            wandb_run.log_adapter(loggers, module.backbone, folder, ["latest"], task)


def is_in_parts(module: LoRAModule) -> bool:
    """Whether this process has only a part of the adapter's tensors."""
    return any(isinstance(p, DTensor) for p in module.backbone.parameters())
