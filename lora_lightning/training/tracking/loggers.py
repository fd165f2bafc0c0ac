"""Loggers that need no account, and that go on with the run that a fit resumes."""

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


class WandbLogger(LightningWandbLogger):
    """Lightning's WandbLogger, which goes offline by itself where W&B has no key, and asks nothing.

    Args:
        offline: keep the run on disk, for `wandb sync`. Left out: offline where there is no key.
        save_dir: where W&B's own folder goes; made where it is missing.

    Raises:
        LoRAError: `offline: false`, and no key: W&B would ask for one.
    """

    def __init__(self, *args: Any, offline: bool | None = None, save_dir: str = "runs", **kwargs: Any) -> None:
        if offline is False and os.environ.get("WANDB_MODE") is None and not has_wandb_key():
            raise LoRAError(
                "W&B has no key here: run `wandb login`, set WANDB_API_KEY, or leave `offline` out: the run then"
                " stays on this disk until `wandb sync`"
            )
        if offline is None:
            offline = os.environ.get("WANDB_MODE") != "disabled" and not has_wandb_key()
            if offline:
                rank_zero_info("W&B: no key found, so this run stays on disk; `wandb sync` uploads it later")
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        if kwargs.get("settings") is None:
            kwargs["settings"] = {"quiet": True}  # it would end with all figures over again
        super().__init__(*args, offline=offline, save_dir=save_dir, **kwargs)  # type: ignore[misc]
        if self._wandb_init.get("anonymous") is None:
            del self._wandb_init["anonymous"]  # W&B warns of the word, whatever its value

    def go_on_with(self, version: str) -> None:
        """Log into the run of this id, unless the config names one itself.

        Offline, what follows lies in a folder of its own, which `wandb sync --append` adds to the run.
        """
        if self._id is None:
            self._id = self._wandb_init["id"] = version
            self._wandb_init["resume"] = "allow"


def runs_of(loggers: Iterable[Logger]) -> list[list[Any]]:
    """What a checkpoint notes of the runs that were logged into, so that a fit that goes on finds them: kind, id."""
    found: list[list[Any]] = []
    for logger in loggers:
        if isinstance(logger, LightningWandbLogger | TensorBoardLogger):
            found.append([_kind(logger), logger.version])
        elif isinstance(logger, MLFlowLogger):
            found.append([_kind(logger), logger.run_id])
    return [[kind, which] for kind, which in found if which is not None]


def go_on_with(loggers: Iterable[Any], runs: Sequence[Sequence[Any]], step: int) -> None:
    """Let each logger log into its own kind's run of the checkpoint, in their order, unless the config names one.

    Args:
        runs: what `runs_of` gave.
        step: the number that the next step is logged under; TensorBoard hides what an interrupted fit wrote after it.
    """
    left = [list(run) for run in runs]
    for logger in loggers:
        mine = next((run for run in left if run[0] == _kind(logger)), None)
        if mine is None:
            continue
        left.remove(mine)
        if isinstance(logger, WandbLogger):
            logger.go_on_with(str(mine[1]))
        elif isinstance(logger, TensorBoardLogger) and logger._version is None:
            logger._version = mine[1]
            if logger._kwargs.get("purge_step") is None:  # the command's parser notes each of SummaryWriter's defaults
                logger._kwargs["purge_step"] = step
        elif isinstance(logger, MLFlowLogger) and logger._run_id is None:
            logger._run_id = mine[1]


def _kind(logger: Any) -> str:
    kinds = (LightningWandbLogger, TensorBoardLogger, MLFlowLogger)
    return next((kind.__name__ for kind in kinds if isinstance(logger, kind)), "")


class ContinuedCSVLogger(CSVLogger):
    """Lightning's CSVLogger, which goes on with the file that is there in place of deleting it."""

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _ContinuedWriter(self.log_dir)
        return self._experiment  # type: ignore[return-value]

    @rank_zero_only
    def go_on_from(self, step: int) -> None:
        """Forget what an interrupted fit wrote after its last checkpoint, which is made anew.

        Args:
            step: the number that the next step is logged under.
        """
        self.save()
        self.experiment.keep_before(step)  # type: ignore[attr-defined]

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """What was written twice, such as the counts at each start, is kept once."""
        super().finalize(status)
        if self._experiment is not None:
            self.experiment.keep_before(None)  # type: ignore[attr-defined]


class RepeatedCSVLogger(CSVLogger):
    """Lightning's CSVLogger, which leaves an earlier log alone until there is a row to put in its place.

    Lightning deletes it before a checkpoint is looked at: a refused `test` would take the last one's figures along.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _RepeatedWriter(self.log_dir)
        return self._experiment  # type: ignore[return-value]


class _RepeatedWriter(ExperimentWriter):
    _is_fresh = False

    def _check_log_dir_exists(self) -> None:
        """It may, and nothing in it is deleted yet."""

    def save(self) -> None:
        if self.metrics and not self._is_fresh:
            Path(self.metrics_file_path).unlink(missing_ok=True)
            self._is_fresh = True
        super().save()


class _ContinuedWriter(ExperimentWriter):
    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.metrics_keys = list(self._rows()[0])

    def _check_log_dir_exists(self) -> None:
        """It should, and nothing in it is deleted."""

    def _rows(self) -> tuple[list[str], list[dict[str, str]]]:
        """The header and the whole rows; the last may be torn."""
        file = Path(self.metrics_file_path)
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        rows = [row for row in reader if None not in row and None not in row.values()]
        return list(reader.fieldnames or []), rows

    def keep_before(self, step: int | None) -> None:
        """Each row once, of steps before this one."""
        keys, rows = self._rows()
        past = [row for row in rows if step is None or (row["step"].isdigit() and int(row["step"]) < step)]
        kept = list({tuple(row.items()): row for row in past}.values())
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=keys)
        writer.writeheader()
        writer.writerows(kept)
        if keys:
            write_bytes(Path(self.metrics_file_path), text.getvalue().encode())


def has_wandb_key() -> bool:
    """Whether W&B can log in without asking: by environment or by netrc, unless WANDB_MODE says offline."""
    if os.environ.get("WANDB_MODE", "") in ("offline", "disabled"):
        return False
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
