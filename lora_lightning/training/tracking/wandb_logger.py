"""W&B's logger, which needs no account; and how each logger continues the run that a fit resumes."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities import rank_zero_info

from lora_lightning.lora.errors import LoRAError


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
