"""What W&B gets beside metrics: tables, the summary, and the adapter and the export as artifacts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from torch import Tensor

from lora_lightning.export.probe_batch import first_batch
from lora_lightning.lora.formats.peft.save import save_adapter
from lora_lightning.lora.frozen.tensors import adapter_bytes
from lora_lightning.reports.classes import input_of
from lora_lightning.tasks.positions import in_evaluation
from lora_lightning.training.callbacks.export_on_fit_end import best_in
from lora_lightning.training.callbacks.prediction_writer import rows
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.checkpoints.adapter_state import RESUME_KEY
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.strategies.base import is_sharded
from lora_lightning.training.tracking.loggers import WandbLogger as ResumableWandbLogger
from lora_lightning.training.tracking.loggers import go_on_with

LARGE = 2 * 10**9
"""Bytes above which an artifact refers to a file in place of copying it."""
SHOWN = 1000
"""Characters at most of a text that is shown."""


class Tracking(Callback):
    """Logs to W&B, where the run does, what metrics do not cover; the command puts it behind all other callbacks.

    The run's config and summary get the counts and the adapter's size, and at the end the content of `report.json`.
    Tables: `injection`, a row for each adapted module, and `predictions` on the first validation rows. Artifacts of the
    run: `adapter-ID:best` and `adapter-ID:latest` (one version where the last state is the best) as PEFT reads
    them, each with report, page and config, and `export-ID` where the fit exported. Files above 2 GB are not uploaded;
    the artifact refers to their path.

    Args:
        predictions: rows of the table of predictions; 0 for none.
        artifacts: whether adapters and exports become artifacts.
    """

    def __init__(self, predictions: int = 16, artifacts: bool = True) -> None:
        self.predictions, self.artifacts = predictions, artifacts

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts in config and summary, and the injection table with a row for each adapted module."""
        if not trainer.is_global_zero or not isinstance(pl_module, LoRAModule):
            return
        report, size = pl_module.report, adapter_bytes(pl_module.backbone)
        counts = {"trainable": report.trainable, "frozen": report.frozen, "share": report.share, "adapter_bytes": size}
        values = {f"params/{name}": value for name, value in counts.items()}
        table = [list(asdict(module).values()) for module in report.modules]
        table += [[name, "in full", None, None, None, n, "modules_to_save"] for name, n in report.saved.items()]
        table += [[name, "rows in full", None, None, None, n, "tokens"] for name, n in report.tokens.items()]
        columns = ["module", "kind", "r", "alpha", "dropout", "parameters", "why"]
        for logger in wandb_loggers(trainer.loggers):
            logger.log_hyperparams(values)
            logger.experiment.summary.update(values)
            logger.log_table("injection", columns=columns, data=table, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict in all processes, since a sharded model needs them all; rank 0 logs."""
        loggers = wandb_loggers(trainer.loggers)
        if not self.predictions or not loggers or not isinstance(pl_module, LoRAModule):
            return
        if (table := prediction_table(trainer, pl_module, self.predictions)) is not None:
            for logger in loggers:
                logger.log_table("predictions", columns=table[0], data=table[1], step=trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the report's values, and the run's adapters and export."""
        folder, loggers = run.dir_to_write(trainer), wandb_loggers(trainer.loggers)
        if folder is None or not loggers or not isinstance(pl_module, LoRAModule):
            return
        report = log_report(loggers, folder)
        if not self.artifacts:
            return
        if is_sharded(pl_module.backbone):  # this process has only a part of the adapter: the checkpoint is whole
            best = Path(getattr(trainer.checkpoint_callback, "best_model_path", ""))
            if best.is_file():
                _log(loggers, "adapter", folder, {best.name: best}, ["best", "latest"])
        else:
            with best_in(trainer, pl_module) as is_last:
                _log_adapter(loggers, pl_module, folder, ["best", "latest"] if is_last else ["best"])
            if not is_last:  # behind the best: W&B gives `latest` to what is logged last
                _log_adapter(loggers, pl_module, folder, ["latest"])
        if exported := [report[key] for key in ("adapter_dir", "merged_dir") if report.get(key)]:
            log_export(loggers, folder, Path(exported[0]).parent)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the test's metrics into the summary of the run that was tested."""
        if trainer.is_global_zero and trainer.ckpt_path and (folder := run.test_dir(trainer)) is not None:
            log_report(wandb_loggers(trainer.loggers), folder)


def wandb_loggers(loggers: Iterable[Any]) -> list[WandbLogger]:
    """The loggers that log to W&B; a `fast_dev_run` has none."""
    return [logger for logger in loggers if isinstance(logger, WandbLogger)]


def log_config(loggers: Iterable[Any], file: Path) -> None:
    """The whole resolved config, key by key as in the file."""
    for logger in wandb_loggers(loggers):
        logger.log_hyperparams(yaml.safe_load(file.read_text(encoding="utf-8")))


def log_report(loggers: Iterable[WandbLogger], folder: Path) -> dict[str, Any]:
    """Log the plain values of `report.json` into the run's summary as `report`; returns them."""
    file = folder / run.REPORT
    report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    plain = {key: value for key, value in report.items() if isinstance(value, str | int | float | bool)}
    for logger in loggers:
        logger.experiment.summary.update({"report": plain})
    return plain


def log_export(loggers: Iterable[Any], folder: Path, directory: Path) -> None:
    """Log an export's files, with the run's report and page, as one artifact."""
    loggers = wandb_loggers(loggers)
    log_report(loggers, folder)
    files = {str(p.relative_to(directory)): p for p in sorted(directory.rglob("*")) if p.is_file()}
    _log(loggers, "export", folder, files, ["best", "latest"])


def _log_adapter(loggers: Iterable[WandbLogger], module: LoRAModule, folder: Path, aliases: Sequence[str]) -> None:
    """The adapter that is in the module as PEFT reads it, with the run's report, page and config, as one artifact."""
    with tempfile.TemporaryDirectory() as scratch:
        written = save_adapter(module.backbone, Path(scratch) / "adapter", task_type=module.task.peft_task_type)
        _log(loggers, "adapter", folder, {file.name: file for file in sorted(Path(written).iterdir())}, aliases)


def _log(
    loggers: Iterable[WandbLogger], kind: str, folder: Path, files: Mapping[str, Path], aliases: Sequence[str]
) -> None:
    """Log files with the run's config, report and page as one artifact.

    `log_artifact` links it to the run; the name carries the run's id, so that aliases are of one run.
    """
    import wandb

    of_run = {name: folder / name for name in (run.CONFIG, run.REPORT, run.PAGE) if (folder / name).is_file()}
    for logger in loggers:
        experiment = logger.experiment
        artifact = wandb.Artifact(f"{kind}-{experiment.id}", type=kind, metadata=log_report([], folder))
        for name, file in {**of_run, **files}.items():
            if file.stat().st_size > LARGE:
                artifact.add_reference(file.resolve().as_uri(), name=name, checksum=False)
            else:
                artifact.add_file(str(file), name=name)
        experiment.log_artifact(artifact, aliases=list(aliases))


def go_on_with_run_of(loggers: Iterable[Any], checkpoint: str | Path) -> None:
    """Log evaluations of a checkpoint to the W&B or MLflow run that trained it, unless the config names one."""
    resumable = [logger for logger in loggers if isinstance(logger, MLFlowLogger | ResumableWandbLogger)]
    if resumable and Path(checkpoint).exists():
        go_on_with(resumable, run.load_checkpoint(checkpoint).get(RESUME_KEY, {}).get("loggers", []), 0)


@torch.no_grad()
def prediction_table(trainer: Trainer, module: LoRAModule, count: int) -> tuple[list[str], list[list[Any]]] | None:
    """Columns and rows for the first `count` examples of this process; None where nothing is validated.

    Before what the task predicts stand the input, a text or a picture where it can be shown, and the target where it is
    one number.
    """
    batch = first_batch([trainer.val_dataloaders], module)
    if batch is None:
        return None
    with in_evaluation(module.backbone), trainer.precision_plugin.forward_context():
        predictions = module.task.predict(module.backbone, batch)
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    names, tokenizer = getattr(data, "label_names", None), getattr(data, "tokenizer", None)
    size, labels = min(count, *map(len, predictions.values())), batch.get("labels")
    targets = labels.tolist() if isinstance(labels, Tensor) and labels.dim() == 1 else []
    if names:
        targets = [names[t] if isinstance(t, int) and 0 <= t < len(names) else t for t in targets]
    table = []
    for row in rows([predictions], [range(size)], names):
        number = row.pop("row")  # in this batch, not in the set
        target = targets[number] if number < len(targets) else None
        beside = {"input": input_of(batch, number, tokenizer), "target": target}
        table.append({name: value for name, value in beside.items() if value is not None} | row)
    return list(table[0]), [[_cell(row.get(name)) for name in table[0]] for row in table]


def _cell(value: Any) -> Any:
    """Lists as text, since a table's column has one type; pictures as W&B's."""
    import wandb

    if isinstance(value, list | dict):
        return str(value)[:SHOWN]
    return wandb.Image(value) if hasattr(value, "thumbnail") else value
