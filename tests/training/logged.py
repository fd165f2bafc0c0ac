"""Fits that log, each in a process of its own; one is killed and goes on. `python -m tests.training.logged CONFIG`.

Forked from one process that has imported all and has done no backward yet, which a fork would not survive. Left behind:
`whole/` and `killed/`, each with its `runs/`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from lora_lightning.cli import LoRACLI

KILLED_AT = 13
"""The optimizer step; `last.ckpt` is written every fourth."""


class Kill(Callback):
    """SIGKILL to this very process once a step was logged."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def loggers() -> list[str]:
    given = ["--trainer.logger+=lora_lightning.WandbLogger", "--trainer.logger.save_dir", "runs"]
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return given
    return [*given, "--trainer.logger+=TensorBoardLogger", "--trainer.logger.save_dir", "boards"]


def fit(config: str, folder: str, *args: str) -> int:
    """The signal that ended the process, or 0."""
    child = os.fork()
    if child == 0:
        Path(folder).mkdir(exist_ok=True)
        os.chdir(folder)
        given = ["fit", "--config", config, "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1"]
        LoRACLI(args=[*given, "--save_every", "4", *loggers(), *args])
        sys.exit()  # at which W&B writes what it still holds
    return os.WTERMSIG(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    config = sys.argv[1]
    ends = [fit(config, "killed", "--trainer.callbacks+=tests.training.logged.Kill")]
    ends.append(fit(config, "killed", "--ckpt_path", "auto"))
    print("ended by signals", ends)
