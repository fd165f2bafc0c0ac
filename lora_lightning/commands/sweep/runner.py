"""Fits, some at once, until all are done: started, watched, given up where that is asked for, and read at their end."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from lora_lightning.commands.sweep.processes import FIT, Fit, shares, start
from lora_lightning.commands.sweep.pruning_callback import ReportValidations, reported
from lora_lightning.commands.sweep.study import Study
from lora_lightning.commands.sweep.trial import LOG, Trial, save
from lora_lightning.training.checkpoints.run_folder import REPORT

CALLBACK = f"{ReportValidations.__module__}.{ReportValidations.__name__}"
Say = Callable[[Trial, str], None]


class Stopped(BaseException):
    """The sweep was asked to end, by SIGTERM."""


@dataclass(kw_only=True)
class Runner:
    """How trials become fits.

    Args:
        sweep: the folder, in which each trial has its own.
        args: of `fit`, the same for all.
        metric: that ranks, such as `val/accuracy`.
        watched: whether fits report each validation, for a pruner.
        lock: a file descriptor that every fit holds.
    """

    sweep: Path
    args: Sequence[str]
    metric: str
    goal: str
    study: Study
    jobs: int
    watched: bool
    lock: int
    say: Say
    command: Sequence[str] = FIT
    gpus: int = 0
    wait: float = 0.2
    """Seconds between two looks at the fits."""
    _running: dict[int, tuple[Trial, Fit]] = field(default_factory=dict)

    def run(self, trials: Iterator[Trial]) -> None:
        """All of them. Where it is interrupted the fits save and end, and their records say that they run.

        Raises:
            Stopped: by SIGTERM.
            KeyboardInterrupt: by Ctrl-C.
        """
        environments = shares(self.jobs, self.gpus, os.environ)
        try:
            with _stopped_by_sigterm():
                left = True
                while left or self._running:
                    for slot in range(self.jobs):
                        if left and slot not in self._running:
                            left = self._start_next(trials, slot, environments[slot])
                    self._look()
                    if self._running:
                        time.sleep(self.wait)
        finally:
            self._end_all()

    def _start_next(self, trials: Iterator[Trial], slot: int, environment: dict[str, str]) -> bool:
        """Whether there was one."""
        trial = next(trials, None)
        if trial is None:
            return False
        self.study.begin(trial)
        trial.state, trial.error = "running", None
        if self._take_result(trial):  # the sweep was killed between a fit's end and its record
            self._close(trial)
            return True
        save(trial, self.sweep)
        own = [f"--{key}={value}" for key, value in trial.values.items()]
        own += [] if trial.seed is None else [f"--seed_everything={trial.seed}"]
        own += [f"--trainer.callbacks+={CALLBACK}"] if self.watched else []
        own += [f"--runs_dir={self.sweep}", f"--name={trial.name}", "--ckpt_path=auto"]
        fit = start([*self.command, *self.args, *own], self.sweep / trial.name / LOG, environment, self.lock)
        self._running[slot] = (trial, fit)
        self.say(trial, "begins")
        return True

    def _look(self) -> None:
        for slot, (trial, fit) in list(self._running.items()):
            code = fit.code()
            if self.watched:
                trial.reported = reported(self.sweep / trial.name, _in_report(self.metric))
            if code is None:
                if trial.state == "running" and self.watched and self.study.is_hopeless(trial):
                    trial.state = "pruned"
                    fit.ask_to_leave()
                continue
            del self._running[slot]
            if code == 0 and self._take_result(trial):
                pass
            elif trial.state == "pruned":
                trial.value = self._best(trial.reported)
            else:
                trial.state, trial.error = "failed", fit.fault() if code else self._nothing(trial)
            self._close(trial)

    def _close(self, trial: Trial) -> None:
        self.study.end(trial)
        save(trial, self.sweep)
        self.say(trial, "ends")

    def _take_result(self, trial: Trial) -> bool:
        """What the run's report says, which a fit writes at its end; whether it has the metric."""
        try:
            report = json.loads((self.sweep / trial.name / REPORT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        value = report.get(_in_report(self.metric))
        if value is None:
            return False
        trial.state, trial.error = "complete", None
        trial.value = float(value) if math.isfinite(float(value)) else None
        trial.trainable, trial.seconds, trial.run = report["trainable"], report["train_seconds"], report["run_dir"]
        return True

    def _nothing(self, trial: Trial) -> str:
        return (
            f"the fit ended without {self.metric} in '{self.sweep / trial.name / REPORT}': the config must validate,"
            " keep a log (no trainer.logger: false), and have a metric of that name"
        )

    def _best(self, found: Sequence[float]) -> float | None:
        return (max if self.goal == "max" else min)(found) if found else None

    def _end_all(self) -> None:
        """All are asked at once, so that they save side by side."""
        for _, fit in self._running.values():
            fit.ask_to_leave()
        for _, fit in self._running.values():
            fit.end()


def _in_report(metric: str) -> str:
    return metric.replace("/", "_")


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM ends the sweep as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
