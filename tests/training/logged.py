"""Fits that log, each in a process of its own; two end early and go on. `python -m tests.training.logged CONFIG`.

Forked from one process that has imported all and has done no backward yet, which a fork would not survive.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from lightning.pytorch import Callback

from lora_lightning.cli.main import LoRACLI

TERM_AT, KILL_AT, STEPS = 5, 11, 16
"""Optimizer steps. `last.ckpt` is written every fourth, an epoch's end (8) and where SIGTERM came."""


class Stop(Callback):
    """A signal to this very process at the start of a step."""

    def __init__(self, at: int, number: int) -> None:
        self.at, self.number = at, number

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.at:
            os.kill(os.getpid(), self.number)


def loggers() -> list[str]:
    given = ["--trainer.logger+=lora_lightning.WandbLogger", "--trainer.logger.save_dir", "runs"]
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return given
    return [*given, "--trainer.logger+=TensorBoardLogger", "--trainer.logger.save_dir", "boards"]


def fit(config: str, *args: str, at: int = -1, number: int = 0) -> int:
    """Sent the signal at that step. Returns the exit code, or minus the signal that ended the process."""
    child = os.fork()
    if child == 0:
        stop = ["--trainer.callbacks+=tests.training.logged.Stop", f"--trainer.callbacks.at={at}"]
        given = ["fit", "--config", config, *stop, f"--trainer.callbacks.number={number}", "--save_every", "4"]
        given += ["--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"]
        LoRACLI(args=[*given, *loggers(), *args])
        sys.exit()  # at which W&B writes what it still holds
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    ends = [
        fit(sys.argv[1], "--ckpt_path", "auto", at=TERM_AT, number=signal.SIGTERM),
        fit(sys.argv[1], "--ckpt_path", "auto", at=KILL_AT, number=signal.SIGKILL),
        fit(sys.argv[1], "--ckpt_path", "auto"),
    ]
    print("ended with", ends)
