"""Loggers that continue the run that a fit resumes, and W&B's, which needs no account."""

from __future__ import annotations

import csv
import io
import netrc
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats.atomic_dir import write_bytes


class _Writer(ExperimentWriter):
    """Lightning's writer, which leaves an earlier log alone until there is a row, or goes on with it."""

    def __init__(self, log_dir: str, goes_on: bool) -> None:
        super().__init__(log_dir)
        self.replaces = not goes_on
        self.metrics_keys = whole_rows(Path(self.metrics_file_path))[0] if goes_on else []

    def _check_log_dir_exists(self) -> None:
        """Accept an existing folder, and delete nothing yet."""

    def save(self) -> None:
        if self.metrics and self.replaces:
            Path(self.metrics_file_path).unlink(missing_ok=True)
            self.replaces = False
        super().save()


class RepeatedCSVLogger(CSVLogger):
    """Lightning's CSVLogger, which leaves an earlier log alone until there is a row to put in its place.

    Lightning deletes it before it reads a checkpoint: a refused `test` would lose the last one's metrics.
    """

    goes_on = False

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir, self.goes_on)
        return self._experiment  # type: ignore[return-value]


class ContinuedCSVLogger(RepeatedCSVLogger):
    """Lightning's CSVLogger, which appends to an existing file in place of deleting it."""

    goes_on = True

    @rank_zero_only
    def go_on_from(self, step: int) -> None:
        """Drop what an interrupted fit wrote from `step`, which the fit logs next, on."""
        self.save()
        keep_before(Path(self.experiment.metrics_file_path), step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Drop repeated rows, such as the counts at each start."""
        super().finalize(status)
        if self._experiment is not None:
            keep_before(Path(self.experiment.metrics_file_path), None)


def whole_rows(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The header and the rows of a CSV file, without what is incomplete at its end."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    rows = [row for row in reader if None not in row and None not in row.values()]
    return list(reader.fieldnames or []), rows


def keep_before(file: Path, step: int | None) -> None:
    """Keep each whole row of the steps before `step`, or of all steps, once."""
    header, rows = whole_rows(file)
    past = [row for row in rows if step is None or (row["step"].isdigit() and int(row["step"]) < step)]
    if not header:
        file.unlink(missing_ok=True)
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, header)
    writer.writeheader()
    writer.writerows({tuple(row.items()): row for row in past}.values())
    write_bytes(file, text.getvalue().encode())


class WandbLogger(LightningWandbLogger):
    """Lightning's WandbLogger, which goes offline where W&B has no key, and never prompts.

    Args:
        offline: keep the run on disk, for `wandb sync`. Left out: offline where there is no key.
        save_dir: the folder for W&B's files; made where it is missing.

    Raises:
        LoRAError: `offline: false` without a key: W&B would prompt for one.
    """

    def __init__(self, *args: Any, offline: bool | None = None, save_dir: str = "runs", **kwargs: Any) -> None:
        if offline is False:
            refuse_no_key()
        if offline is None:
            offline = os.environ.get("WANDB_MODE") != "disabled" and not has_wandb_key()
            if offline:
                rank_zero_info("W&B: no key found, so this run stays on disk; `wandb sync` uploads it later")
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        if kwargs.get("settings") is None:
            kwargs["settings"] = {"quiet": True}  # else W&B prints all metrics again at the end
        super().__init__(*args, offline=offline, save_dir=save_dir, **kwargs)  # type: ignore[misc]
        init = self._wandb_init  # Lightning has no public way to what it hands to wandb.init
        if init.get("anonymous") is None:
            del init["anonymous"]  # W&B warns of the word, whatever its value

    def go_on_with(self, version: str) -> None:
        """Log into the run with this id, unless the config names one.

        Offline, further rows go to a new folder, which `wandb sync --append` adds to the run.
        """
        if self._id is None:
            self._id = version
            self._wandb_init.update(id=version, resume="allow")


def runs_of(loggers: Iterable[Logger]) -> list[list[Any]]:
    """Kind and id of each logger's run; a checkpoint has them, so that a resumed fit finds the runs."""
    runs = [[kind, logger.version] for logger in loggers if (kind := _kind(logger))]
    return [[kind, version] for kind, version in runs if version is not None]


def go_on_with(loggers: Iterable[Any], runs: Sequence[Sequence[Any]], step: int) -> None:
    """Let each logger continue the checkpoint's run of its kind, in order, unless the config names one.

    Args:
        runs: the result of `runs_of`.
        step: the number under which the next step is logged; TensorBoard hides what an interrupted fit wrote after it.
    """
    remaining = [list(run) for run in runs]
    for logger in loggers:
        mine = next((run for run in remaining if run[0] == _kind(logger)), None)
        if mine is None:
            continue
        remaining.remove(mine)
        if isinstance(logger, WandbLogger):
            logger.go_on_with(str(mine[1]))
        elif isinstance(logger, TensorBoardLogger) and logger._version is None:
            logger._version = mine[1]
            options = logger._kwargs
            if options.get("purge_step") is None:  # the command's parser notes each of SummaryWriter's defaults
                options["purge_step"] = step
        elif isinstance(logger, MLFlowLogger) and logger._run_id is None:
            logger._run_id = mine[1]


def _kind(logger: Any) -> str:
    kinds = (LightningWandbLogger, TensorBoardLogger, MLFlowLogger)
    return next((kind.__name__ for kind in kinds if isinstance(logger, kind)), "")


def refuse_no_key() -> None:
    """Raise where a run is to be online and W&B would prompt for a key."""
    if os.environ.get("WANDB_MODE") is None and not has_wandb_key():
        raise LoRAError(
            "W&B has no key here: run `wandb login`, set WANDB_API_KEY, or leave `offline` out: the run then stays on"
            " this disk until `wandb sync`"
        )


def has_wandb_key() -> bool:
    """Whether W&B can log in without a prompt: by environment or by netrc, unless WANDB_MODE says offline."""
    if os.environ.get("WANDB_MODE", "") in ("offline", "disabled"):
        return False
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
