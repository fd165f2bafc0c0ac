"""The run's own `report.json`, filled as the run goes on, and `report.html`, which shows it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from torch import nn

from lora_lightning.data.base import TableData
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.frozen.tensors import adapter_bytes
from lora_lightning.reports.about import adapted_rows, backbone_name
from lora_lightning.reports.console import show_report
from lora_lightning.reports.page import write_page
from lora_lightning.reports.parts import parts_of
from lora_lightning.training.callbacks.freeze_base import FreezeBase
from lora_lightning.training.callbacks.throughput import Throughput
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.strategies.base import is_sharded


class RunReport(Callback):
    """Writes what a fit and a test found into `report.json` in the run folder, and the page `report.html`."""

    def __init__(self) -> None:
        self._started = 0.0
        self._seconds = 0.0
        self._before = 0.0
        self._by_step: dict[int, dict[str, float]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Seconds and figures so far, for a fit that goes on from the checkpoint."""
        return {"seconds": self._before + time.perf_counter() - self._started, "by_step": dict(self._by_step)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before, self._by_step = float(state_dict["seconds"]), dict(state_dict["by_step"])
        self._seconds = self._before  # where nothing is left to train, no more come to it

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember each validation's figures: which of them were best is known at the end."""
        if not trainer.sanity_checking:
            self._by_step[trainer.global_step] = metrics_of(trainer, "val")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seconds = self._before + time.perf_counter() - self._started

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts, fingerprints, time, and the metric that chose the best checkpoint."""
        folder = run.run_dir(trainer)
        if folder is None or not trainer.is_global_zero or not isinstance(pl_module, LoRAModule):
            return
        report, w0 = pl_module.report, pl_module.w0_fingerprint()
        guards = [c.after for c in trainer.callbacks if isinstance(c, FreezeBase) and c.after]  # type: ignore[attr-defined]
        # By one process of many, parts cannot be gathered: without the guard nothing is known of them.
        unknown = not guards and is_sharded(pl_module.backbone)
        after = None if unknown else guards[0] if guards else fingerprint(pl_module.backbone)
        values: dict[str, Any] = {
            "run_dir": str(folder),
            **subject(pl_module),
            **cost(trainer, pl_module),
            "trainable": report.trainable,
            "total": report.total,
            "share": report.share,
            "w0_before": w0.digest,
            "w0_after": after and after.digest,
            "w0_unchanged": after and w0.digest == after.digest,
            "train_seconds": round(self._seconds, 1),
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "precision": str(trainer.precision),
            "dtypes": parts_of(pl_module, trainer).to_dict(),
            "full_checkpoint_bytes": _full_bytes(pl_module.backbone),
        }
        if summary := getattr(trainer.datamodule, "data_summary", None):  # type: ignore[attr-defined]
            values["data"] = summary
        if pl_module.init_adapter is not None:
            values["init_adapter"] = pl_module.init_adapter
        values |= metrics_of(trainer, "val")
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_path:
            values |= {"monitor": checkpoint.monitor} | self._of_best(checkpoint.best_model_path)
        for logger in trainer.loggers:
            logger.save()  # the page is drawn from the log
        show_report(self._written(folder, values), Console())

    def _of_best(self, path: str) -> dict[str, Any]:
        """Where it lies and what was measured at its step; nothing where somebody has deleted it: the fit is done."""
        try:
            step = run.load_checkpoint(path)["global_step"]
        except LoRAError as error:
            rank_zero_warn(f"'{path}' is gone or damaged since it was written: {error}")
            return {}
        return {"checkpoint": path, **self._by_step.get(step, {}), "best_step": step - 1}  # as loggers count, from 0

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test metrics, into the report of the run that the checkpoint came from; of other data into one beside it."""
        folder = run.test_dir(trainer)
        if trainer.fast_dev_run or not trainer.is_global_zero or folder is None:  # type: ignore[attr-defined]
            return
        values = {**metrics_of(trainer, "test"), "test_checkpoint": str(trainer.ckpt_path)}
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, TableData) and (count := data.rows_of("test")) is not None:
            values |= {"test_rows": count, "test_data": data.place("test")}
        if trainer.ckpt_path is None or folder == run.run_of_checkpoint(Path(str(trainer.ckpt_path))):
            show_report(self._written(folder, values), Console())
        else:
            show_report(run.update_report(folder, {**values, "run_dir": str(folder)}), Console())

    def _written(self, folder: Path, values: dict[str, Any]) -> dict[str, Any]:
        known = run.update_report(folder, {**values, "page": str(folder / run.PAGE)})
        write_page(folder)
        return known


def _full_bytes(model: nn.Module) -> int:
    """What a full checkpoint of the weights would take: the backbone's own tensors."""
    return sum(t.numel() * t.element_size() for n, t in model.state_dict().items() if ".lora_" not in n)


def metrics_of(trainer: Trainer, stage: str) -> dict[str, float]:
    """A stage's figures as the report names them."""
    found = trainer.callback_metrics.items()
    return {
        name.replace("/", "_"): float(value) for name, value in found if name.startswith((f"{stage}/", f"{stage}_"))
    }


def subject(module: LoRAModule) -> dict[str, Any]:
    """What was adapted, and how."""
    return {
        "backbone": backbone_name(module.backbone),
        "task": type(module.task).__name__,
        "lora": module.lora.to_dict(),
        "adapted": adapted_rows(module.report),
        "adapter_tensor_bytes": adapter_bytes(module.backbone),
    }


def cost(trainer: Trainer, module: LoRAModule) -> dict[str, Any]:
    """How fast the fit went on the whole, and what it took of which device."""
    values: dict[str, Any] = {"device": module.device.type, "processes": trainer.world_size}
    for meter in (c for c in trainer.callbacks if isinstance(c, Throughput)):  # type: ignore[attr-defined]
        if meter.seconds:
            values["samples_per_second"] = meter.samples / meter.seconds
            values["tokens_per_second"] = meter.tokens / meter.seconds
        values |= {"samples_seen": round(meter.samples), "tokens_seen": round(meter.tokens), "peak_mib": meter.peak_mib}
    return values
