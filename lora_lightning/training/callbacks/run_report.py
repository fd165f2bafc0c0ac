"""The run's own `report.json`, filled as the run goes on."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lora_lightning.lora.fingerprint import fingerprint
from lora_lightning.training import run
from lora_lightning.training.module import LoRAModule


class RunReport(Callback):
    """Writes what a fit and a test found into `report.json` in the run folder."""

    def __init__(self) -> None:
        self._started = 0.0
        self._seconds = 0.0
        self._best: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seconds = time.perf_counter() - self._started

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts, fingerprints, time, and the metric that chose the best checkpoint."""
        folder = run.run_dir(trainer)
        if folder is None or not trainer.is_global_zero or not isinstance(pl_module, LoRAModule):
            return
        report, w0 = pl_module.report, pl_module.w0_fingerprint()
        after = fingerprint(pl_module.backbone)
        values: dict[str, Any] = {
            "run_dir": str(folder),
            "trainable": report.trainable,
            "total": report.total,
            "share": report.share,
            "w0_before": w0.digest,
            "w0_after": after.digest,
            "w0_unchanged": w0.digest == after.digest,
            "train_seconds": round(self._seconds, 1),
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "precision": str(trainer.precision),
            "full_checkpoint_bytes": _bytes(pl_module.backbone),
        }
        values |= _metrics(trainer, "val")
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_path:
            values["checkpoint"] = checkpoint.best_model_path
            if checkpoint.monitor and checkpoint.best_model_score is not None:
                monitored, best = checkpoint.monitor.replace("/", "_"), float(checkpoint.best_model_score)
                if values.get(monitored) != best:  # the last epoch's other figures are not those of the best
                    values = {k: v for k, v in values.items() if not k.startswith("val_")}
                values[monitored] = best
        run.update_report(folder, values)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test metrics, into the report of the run that the checkpoint came from."""
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        checkpoint = trainer.ckpt_path
        folder = run.run_of_checkpoint(_path(checkpoint)) if checkpoint else run.run_dir(trainer)
        if folder is not None:
            run.update_report(folder, _metrics(trainer, "test"))


def _metrics(trainer: Trainer, stage: str) -> dict[str, float]:
    found = trainer.callback_metrics.items()
    return {name.replace("/", "_"): float(value) for name, value in found if name.startswith(f"{stage}/")}


def _bytes(model: Any) -> int:
    """What a full checkpoint of the weights would take: the backbone's own tensors."""
    return sum(t.numel() * t.element_size() for n, t in model.state_dict().items() if ".lora_" not in n)


def _path(checkpoint: Any) -> Any:
    from pathlib import Path

    return Path(str(checkpoint))
