"""What a W&B run gets beside figures: its config and counts, tables, a summary, and what the run made as artifacts.

Everything here works offline too: W&B notes it in the run's `.wandb` file, and `wandb sync` brings it up.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from torch import nn

from lora_lightning.lora.formats.peft.save import save_adapter
from lora_lightning.lora.report import InjectionReport
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.tracking.loggers import go_on_with

LARGE = 2 * 10**9
"""Bytes of a file beyond which an artifact holds where it lies in place of a copy."""


def wandb_loggers(loggers: Iterable[Any]) -> list[WandbLogger]:
    """Those that log to W&B."""
    return [logger for logger in loggers if isinstance(logger, WandbLogger)]


def log_config(loggers: Iterable[Any], file: Path) -> None:
    """The whole resolved config, key by key as in the file."""
    for logger in wandb_loggers(loggers):
        logger.log_hyperparams(yaml.safe_load(file.read_text(encoding="utf-8")))


def log_start(trainer: Trainer, report: InjectionReport, adapter_bytes: int) -> None:
    """Counts in config and summary, and the injection table with a row for each adapted module."""
    counts = {"trainable": report.trainable, "frozen": report.frozen, "share": report.share}
    values = {f"params/{name}": x for name, x in {**counts, "adapter_bytes": adapter_bytes}.items()}
    rows = [list(asdict(module).values()) for module in report.modules]
    rows += [[name, "in full", None, None, None, n, "modules_to_save"] for name, n in report.saved.items()]
    rows += [[name, "rows in full", None, None, None, n, "tokens"] for name, n in report.tokens.items()]
    columns = ["module", "kind", "r", "alpha", "dropout", "parameters", "why"]
    for logger in wandb_loggers(trainer.loggers):
        logger.log_hyperparams(values)
        logger.experiment.summary.update(values)
        logger.log_table("injection", columns=columns, data=rows, step=trainer.global_step)


def log_report(loggers: Iterable[Any], folder: Path) -> dict[str, Any]:
    """What `report.json` says, in the run's summary as `report`; returns its plain values."""
    file = folder / run.REPORT
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    plain = {key: value for key, value in known.items() if isinstance(value, str | int | float | bool)}
    for logger in wandb_loggers(loggers):
        logger.experiment.summary.update({"report": plain})
    return plain


def log_adapter(
    loggers: Iterable[Any], backbone: nn.Module, folder: Path, aliases: Sequence[str], task_type: str | None = None
) -> None:
    """The adapter that is in `backbone` as PEFT reads it, with the run's report, page and config, as one artifact."""
    ours = wandb_loggers(loggers)
    if not ours:
        return
    with tempfile.TemporaryDirectory() as scratch:
        files = {file.name: file for file in _beside(folder)}
        written = save_adapter(backbone, Path(scratch) / "adapter", task_type=task_type)
        files |= {file.name: file for file in sorted(Path(written).iterdir())}
        for logger in ours:
            _log(logger, "adapter", files, aliases, log_report([], folder))


def log_checkpoint(loggers: Iterable[Any], checkpoint: Path, folder: Path, aliases: Sequence[str]) -> None:
    """A checkpoint in the adapter's place, where the adapter's parts lie with several processes."""
    parts = [checkpoint] if checkpoint.is_file() else sorted(p for p in checkpoint.rglob("*") if p.is_file())
    files = {file.name: file for file in _beside(folder)}
    files |= {f"{checkpoint.name}/{p.relative_to(checkpoint)}" if p != checkpoint else p.name: p for p in parts}
    for logger in wandb_loggers(loggers):
        _log(logger, "adapter", files, aliases, log_report([], folder))


def log_export(loggers: Iterable[Any], folder: Path, directory: Path) -> None:
    """All that an export wrote, and the run's report and page as they are now."""
    files = {file.name: file for file in _beside(folder)}
    files |= {str(p.relative_to(directory)): p for p in sorted(directory.rglob("*")) if p.is_file()}
    for logger in wandb_loggers(loggers):
        _log(logger, "export", files, ["best", "latest"], log_report([logger], folder))


def go_on_with_run_of(loggers: Iterable[Any], checkpoint: str | Path) -> None:
    """Let what is found on a trained run go to the W&B or MLflow run that trained it, unless the config names one."""
    from lora_lightning.training.checkpoints.resume import KEY  # callbacks import the trainer, which imports this file

    given = list(loggers)
    ours = [logger for logger in wandb_loggers(given) if hasattr(logger, "go_on_with")]
    flows = [logger for logger in given if isinstance(logger, MLFlowLogger)]
    if not (ours or flows) or not Path(checkpoint).exists():
        return
    found = run.load_checkpoint(checkpoint).get(KEY, {})
    go_on_with(flows, found.get("loggers", []), 0)
    runs = [which for kind, which in found.get("loggers", []) if kind == "WandbLogger"] or found.get("wandb", [])
    for logger, version in zip(ours, runs, strict=False):
        logger.go_on_with(str(version))


def _beside(folder: Path) -> list[Path]:
    return [folder / name for name in (run.CONFIG, run.REPORT, run.PAGE) if (folder / name).is_file()]


def _log(
    logger: WandbLogger, kind: str, files: Mapping[str, Path], aliases: Sequence[str], metadata: dict[str, Any]
) -> None:
    """`log_artifact` links it to the run; the name carries the run's id, so that aliases are of one run."""
    import wandb

    experiment = logger.experiment
    artifact = wandb.Artifact(f"{kind}-{experiment.id}", type=kind, metadata=metadata)
    for name, file in files.items():
        if file.stat().st_size > LARGE:
            artifact.add_reference(file.resolve().as_uri(), name=name, checksum=False)
        else:
            artifact.add_file(str(file), name=name)
    experiment.log_artifact(artifact, aliases=list(aliases))
