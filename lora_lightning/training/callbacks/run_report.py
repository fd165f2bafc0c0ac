"""Writes the run's `report.json`, and `report.html`, which shows it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from torch import Tensor

from lora_lightning.data import table_of
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats.atomic_dir import write_bytes
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.frozen.tensors import adapter_bytes
from lora_lightning.reports.classes import MOST_CLASSES, ClassCounts
from lora_lightning.reports.console import BEFORE, adapted_rows, backbone_name, part_dtypes, show_data, show_report
from lora_lightning.reports.html import CLASSES, write_page
from lora_lightning.tasks.classification import ImageClassification, SequenceClassification
from lora_lightning.training.callbacks.guards import FreezeBase
from lora_lightning.training.callbacks.steps import Throughput
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.strategies.base import is_sharded
from lora_lightning.training.strategies.collectives import gather

OF_BEST = re.compile("test_|export_|merged_|adapter_(dir|bytes)")
"""The report's entries on the best checkpoint that commands after the fit have added."""


class RunReport(Callback):
    """Writes the results of a fit and of a test into `report.json` in the run folder, and the page `report.html`."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._seconds = 0.0
        """Of training, until `_started`."""
        self._by_step: dict[int, dict[str, float]] = {}
        """Each validation's metrics."""
        self._classes: ClassCounts | None = None
        """Of the running evaluation of a classifier."""

    def state_dict(self) -> dict[str, Any]:
        """Seconds and metrics so far, for a resumed fit."""
        return {"seconds": self._total_seconds(), "by_step": dict(self._by_step)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds, self._by_step = float(state_dict["seconds"]), dict(state_dict["by_step"])

    def _total_seconds(self) -> float:
        return self._seconds + (0.0 if self._started is None else time.perf_counter() - self._started)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count classes for a task that gives each example one of them, unless they are very many."""
        task = getattr(pl_module, "task", None)
        counts = isinstance(task, SequenceClassification | ImageClassification) and task.num_classes <= MOST_CLASSES
        self._classes = ClassCounts(task.num_classes) if counts else None  # type: ignore[union-attr]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the summary of test data that are not the run's."""
        self.on_validation_start(trainer, pl_module)
        if trainer.is_global_zero and _of_other_data(trainer):
            show_data(getattr(trainer.datamodule, "data_summary", None), Console())  # type: ignore[attr-defined]

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the classes of the first set's batches."""
        if self._classes is None or dataloader_idx or not isinstance(outputs, Mapping):
            return
        logits, labels = outputs.get("predictions"), outputs.get("targets")
        if isinstance(logits, Tensor) and isinstance(labels, Tensor) and logits.dim() == 2 and labels.dim() == 1:
            tokenizer = getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
            self._classes.add(logits, labels, batch, tokenizer)

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember each validation's metrics, and write the class counts of the best one so far."""
        if trainer.sanity_checking:
            return
        self._by_step[trainer.global_step] = metrics_of(trainer, "val")
        checkpoint = trainer.checkpoint_callback  # it looks at this validation after all other callbacks
        figure = trainer.callback_metrics.get(str(getattr(checkpoint, "monitor", None)))
        best = getattr(checkpoint, "best_model_score", None)
        sign = 1 if getattr(checkpoint, "mode", None) == "max" else -1
        is_best = figure is None or best is None or sign * float(figure) > sign * float(best)
        if is_best and trainer.state.fn == TrainerFn.FITTING:
            self._write_classes(trainer, run.run_dir(trainer), "val")

    def _write_classes(self, trainer: Trainer, folder: Path | None, stage: str) -> None:
        """Gather all processes' class counts; rank 0 writes."""
        if self._classes is None:
            return
        counts, *other_counts = gather(self._classes)
        if folder is None or not trainer.is_global_zero:
            return
        names = getattr(trainer.datamodule, "label_names", None)  # type: ignore[attr-defined]
        figures = counts.join(other_counts).to_dict(None if names is None else list(names))
        write_bytes(folder / CLASSES.format(stage=stage), (json.dumps(figures) + "\n").encode())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what was measured of an earlier best, before an export of this one is recorded."""
        self._seconds, self._started = self._total_seconds(), None
        folder, best = run.dir_to_write(trainer), getattr(trainer.checkpoint_callback, "best_model_path", "")
        if folder is None or not best:
            return
        before, now = run.read_report(folder / run.REPORT).get("best_step"), self._of_best(best).get("best_step")
        if before is not None and now is not None and before != now:
            run.update_report(folder, {}, forget=lambda key: OF_BEST.match(key) is not None)
            (folder / CLASSES.format(stage="test")).unlink(missing_ok=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts, fingerprints, time, and the metric that chose the best checkpoint."""
        folder = run.dir_to_write(trainer)
        if folder is None or not isinstance(pl_module, LoRAModule):
            return
        report, w0 = pl_module.report, pl_module.w0_fingerprint()
        after = next((c.after for c in trainer.callbacks if isinstance(c, FreezeBase) and c.after), None)  # type: ignore[attr-defined]
        if after is None and not is_sharded(pl_module.backbone):  # one process of several cannot gather shards
            after = fingerprint(pl_module.backbone)
        state = pl_module.backbone.state_dict()
        values: dict[str, Any] = {
            **subject(trainer, pl_module, folder),
            "device": pl_module.device.type,
            "processes": trainer.world_size,
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
            "dtypes": part_dtypes(pl_module.backbone, pl_module.backbone_mode, trainer),
            "full_checkpoint_bytes": sum(t.nbytes for name, t in state.items() if ".lora_" not in name),
            **({} if pl_module.init_adapter is None else {"init_adapter": pl_module.init_adapter}),
            **metrics_of(trainer, "val"),
        }
        for meter in (c for c in trainer.callbacks if isinstance(c, Throughput)):  # type: ignore[attr-defined]
            counts = {"samples": meter.samples, "tokens": meter.tokens}
            if meter.seconds:
                values |= {f"{name}_per_second": count / meter.seconds for name, count in counts.items()}
            values |= {f"{name}_seen": round(count) for name, count in counts.items()} | {"peak_mib": meter.peak_mib}
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_path:
            values |= {"monitor": checkpoint.monitor} | self._of_best(checkpoint.best_model_path)
        for logger in trainer.loggers:
            logger.save()  # the page reads the log
        write_results(folder, values)

    def _of_best(self, path: str) -> dict[str, Any]:
        """Path and metrics of the best checkpoint; empty where its file was deleted since."""
        try:
            step = run.load_checkpoint(path)["global_step"]
        except LoRAError as error:
            rank_zero_warn(f"'{path}' is gone or damaged since it was written: {error}")
            return {}
        return {"checkpoint": path, **self._by_step.get(step, {}), "best_step": step - 1}  # as loggers count, from 0

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write test metrics into the report of the checkpoint's run; of other data into one beside it."""
        folder = run.test_dir(trainer)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._write_classes(trainer, folder, "test")
        if folder is None or not trainer.is_global_zero:
            return
        values: dict[str, Any] = {**metrics_of(trainer, "test"), "test_checkpoint": str(trainer.ckpt_path)}
        data = table_of(trainer.datamodule)  # type: ignore[attr-defined]
        if data is not None and (count := data.rows_of("test")) is not None:
            values |= {"test_rows": count, "test_data": " and ".join(map(data.place, data.sets("test")))}
        if _of_other_data(trainer) and isinstance(pl_module, LoRAModule):
            values |= {"monitor": pl_module.task.monitor, **subject(trainer, pl_module, folder)}
        write_results(folder, values)


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


def _of_other_data(trainer: Trainer) -> bool:
    """Whether a test's metrics go to a folder beside the checkpoint's run."""
    path = trainer.ckpt_path
    return path is not None and run.test_dir(trainer) != run.run_of_checkpoint(Path(str(path)))


def metrics_of(trainer: Trainer, stage: str) -> dict[str, float]:
    """A stage's metrics under the report's names."""
    figures = {name.replace("/", "_"): float(value) for name, value in trainer.callback_metrics.items()}
    return {name: value for name, value in figures.items() if name.startswith(f"{stage}_")}


def write_results(folder: Path, values: dict[str, Any]) -> None:
    """Add to the run's report, write its page, and show the whole report."""
    report = run.update_report(folder, {**values, "page": str(folder / run.PAGE)})
    write_page(folder)
    show_report(report, Console())


def subject(trainer: Trainer, module: LoRAModule, folder: Path) -> dict[str, Any]:
    """What was adapted, how, on which data, and where the results are."""
    collection: Any = module.task.metrics["val_"]
    averages = {name: getattr(metric, "average", None) for name, metric in collection.items(keep_base=True)}
    titles = {"f1": "F1", "precision": "precision", "recall": "recall"}  # of metrics that average over classes
    return {
        "run_dir": str(folder),
        "data": getattr(trainer.datamodule, "data_summary", None),  # type: ignore[attr-defined]
        "backbone": backbone_name(module.backbone),
        "task": type(module.task).__name__,
        "lora": module.lora.to_dict(),
        "adapted": adapted_rows(module.report),
        "metric_titles": {n: f"{titles[n]} ({kind})" for n, kind in averages.items() if n in titles and kind},
        "adapter_tensor_bytes": adapter_bytes(module.backbone),
    }
