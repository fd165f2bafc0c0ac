"""Runs fits as processes, several at once, until the study is done: starts, watches, prunes and records them."""

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

from lora_lightning.commands.sweep.processes import FIT, Fit, shares
from lora_lightning.commands.sweep.pruning_callback import ReportValidations, reported_values
from lora_lightning.commands.sweep.study import Study, Trial
from lora_lightning.training.checkpoints.run_folder import REPORT

CALLBACK = f"{ReportValidations.__module__}.{ReportValidations.__name__}"
LOG = "log.txt"
BEAT = 30.0
"""Seconds between two heartbeats for the other processes of the study."""
Say = Callable[[Trial, str], None]


class Stopped(BaseException):
    """SIGTERM ended the sweep."""


@dataclass(kw_only=True)
class Runner:
    """Runs trials as fits.

    Args:
        folder: the sweep's, with a folder for each trial.
        args: of `fit`, the same for all.
        metric: ranks the fits, such as `val/accuracy`.
        claim: takes the study's next trial; None where there is none at the moment.
        watched: whether fits report each validation, for a pruner.
    """

    folder: Path
    args: Sequence[str]
    metric: str
    study: Study
    claim: Callable[[], Trial | None]
    say: Say
    jobs: int = 1
    watched: bool = False
    command: Sequence[str] = FIT
    gpus: int = 0
    wait: float = 0.2
    """Seconds between two checks of the fits."""
    _running: dict[int, tuple[Trial, Fit]] = field(default_factory=dict)
    _beat: float = 0.0

    def run(self) -> None:
        """Run all trials, also those that other processes leave. On an interruption the fits save and end.

        Raises:
            Stopped: by SIGTERM.
            KeyboardInterrupt: by Ctrl-C.
        """
        environments = shares(self.jobs, self.gpus, os.environ)
        try:
            with _stop_on_sigterm():
                while self.study.unfinished():
                    for slot in range(self.jobs):
                        while slot not in self._running and (trial := self.claim()) is not None:
                            self._start(trial, slot, environments[slot])
                    self._look()
                    if self.study.unfinished():
                        time.sleep(self.wait)
        finally:
            self._end_all()

    def _start(self, trial: Trial, slot: int, environment: dict[str, str]) -> None:
        if take_result(trial, self.folder, self.metric):  # the sweep was killed between a fit's end and its record
            self._close(trial)
            return
        flags = [f"--{key}={value}" for key, value in trial.values.items()]
        flags += [] if trial.seed is None else [f"--seed_everything={trial.seed}"]
        flags += [f"--trainer.callbacks+={CALLBACK}"] if self.watched else []
        flags += [f"--runs_dir={self.folder}", f"--name={trial.name}", "--ckpt_path=auto"]
        fit = Fit.start([*self.command, *self.args, *flags], self.folder / trial.name / LOG, environment)
        self._running[slot] = (trial, fit)
        self.study.beat(trial.number, fit.process.pid)
        self.say(trial, "begins")

    def _look(self) -> None:
        if time.monotonic() - self._beat > BEAT:
            self._beat = time.monotonic()
            for trial, fit in self._running.values():
                self.study.beat(trial.number, fit.process.pid)
        for slot, (trial, fit) in list(self._running.items()):
            code = fit.process.poll()
            if self.watched:
                trial.reported = reported_values(self.folder / trial.name, _report_key(self.metric))
            if code is None:
                if trial.state == "running" and self.watched and self.study.should_prune(trial):
                    trial.state = "pruned"
                    fit.ask_to_leave()
                continue
            del self._running[slot]
            if not (code == 0 and take_result(trial, self.folder, self.metric)) and trial.state != "pruned":
                no_metric = (
                    f"the fit ended without {self.metric} in '{self.folder / trial.name / REPORT}': the config must"
                    " validate, keep a log (no trainer.logger: false), and have a metric of that name"
                )
                trial.state, trial.error = "failed", fit.fault() if code else no_metric
            self._close(trial)

    def _close(self, trial: Trial) -> None:
        self.study.finish(trial)
        self.say(trial, "ends")

    def _end_all(self) -> None:
        """End all fits at once, so that they save in parallel, and release their trials."""
        for _, fit in self._running.values():
            fit.ask_to_leave()
        for trial, fit in self._running.values():
            fit.end()
            self.study.release(trial.number)


def take_result(trial: Trial, folder: Path, metric: str) -> bool:
    """Read the run's report, which a fit writes at its end; whether it has the metric."""
    try:
        report = json.loads((folder / trial.name / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    value = report.get(_report_key(metric))
    if value is None:
        return False
    trial.state, trial.error = "complete", None
    trial.value = float(value) if math.isfinite(float(value)) else None
    trial.trainable, trial.seconds, trial.run = report["trainable"], report["train_seconds"], report["run_dir"]
    return True


def _report_key(metric: str) -> str:
    return metric.replace("/", "_")


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """Within the block SIGTERM ends the sweep as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
