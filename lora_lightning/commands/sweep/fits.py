"""The trials of a sweep as processes: each is `lora-lightning fit` with its output in a file, and ends when the sweep
does."""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from lora_lightning.commands.sweep.pruning_callback import ReportValidations, report_key, reported_values
from lora_lightning.commands.sweep.study import Study, Trial
from lora_lightning.commands.sweep.sweep import Sweep
from lora_lightning.training.checkpoints.run_folder import REPORT

CALLBACK = f"{ReportValidations.__module__}.{ReportValidations.__name__}"
FIT = (sys.executable, "-m", "lora_lightning", "fit")
LOG = "log.txt"
ERROR = "lora-lightning: error: "
PERIOD, PATIENCE = 0.2, 60.0
"""Seconds between two looks at the fits, and that a fit has to write its checkpoint and end after SIGTERM."""
SET_PDEATHSIG = 1
"""The option of Linux's prctl that sets the signal a process gets when its parent dies, also by SIGKILL."""
Say = Callable[[Trial, str], None]
"""Called with each trial and `begins` or `ends`."""


class Stopped(BaseException):
    """SIGTERM ended the sweep."""


def run_fits(sweep: Sweep, study: Study, say: Say, command: Sequence[str] = FIT) -> None:
    """Run all fits, several at once, also those that other processes leave. On an interruption they save and end.

    Args:
        command: of a fit, without its flags.

    Raises:
        Stopped: by SIGTERM.
        KeyboardInterrupt: by Ctrl-C.
    """
    watches = sweep.request.pruner != "none"
    watch = [f"--trainer.callbacks+={CALLBACK}"] if watches else []
    running: dict[int, tuple[Trial, subprocess.Popen[bytes]]] = {}  # by job

    def begin(job: int, environment: Mapping[str, str]) -> None:
        while job not in running and (trial := study.next()) is not None:
            if read_result(trial, sweep):  # the sweep was killed between a fit's end and its record
                finish(trial)
                continue
            words = [*command, *fit_flags(sweep, trial), *watch]
            process = _start(words, sweep.folder / trial.name / LOG, environment)
            running[job] = trial, process
            study.set_owner(trial.number, process.pid)
            say(trial, "begins")

    def look(job: int) -> None:
        """Prune the fit if it falls behind, and record it if it has ended."""
        trial, process = running[job]
        code = process.poll()
        if watches:
            trial.reported = reported_values(sweep.folder / trial.name, sweep.metric)
            if code is None and trial.state == "running" and study.should_prune(trial):
                trial.state = "pruned"
                _send(process, signal.SIGTERM)
        if code is not None:
            del running[job]
            if not (code == 0 and read_result(trial, sweep)) and trial.state != "pruned":
                trial.state, trial.error = "failed", _fault(sweep, trial, code)
            finish(trial)

    def finish(trial: Trial) -> None:
        study.finish(trial)
        say(trial, "ends")

    environments = shares(sweep.request.jobs, torch.cuda.device_count(), os.environ)
    try:
        with _stop_on_sigterm():
            while study.is_open():
                for job, environment in enumerate(environments):
                    begin(job, environment)
                time.sleep(PERIOD)
                study.beat()
                for job in list(running):
                    look(job)
    finally:
        for _, process in running.values():  # all at once, so that they save in parallel
            _send(process, signal.SIGTERM)
        for trial, process in running.values():
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE)
            finally:
                _send(process, signal.SIGKILL)
                process.wait()
            study.release(trial.number)


def fit_flags(sweep: Sweep, trial: Trial) -> list[str]:
    """The flags of a trial's fit."""
    values = [f"--{key}={value}" for key, value in trial.values.items()]
    seed = [] if trial.seed is None else [f"--seed_everything={trial.seed}"]
    of_run = [f"--runs_dir={sweep.folder}", f"--name={trial.name}", "--ckpt_path=auto"]
    return [*sweep.request.fit, *values, *seed, *of_run]


def read_result(trial: Trial, sweep: Sweep) -> bool:
    """Read the run's report, which a fit writes at its end; whether it has the metric."""
    try:
        report = json.loads((sweep.folder / trial.name / REPORT).read_text(encoding="utf-8"))
        value = float(report[report_key(sweep.metric)])
    except (OSError, ValueError, KeyError):
        return False
    trial.state, trial.error, trial.value = "complete", None, value if math.isfinite(value) else None
    trial.trainable, trial.seconds, trial.run = report["trainable"], report["train_seconds"], report["run_dir"]
    return True


def _fault(sweep: Sweep, trial: Trial, code: int) -> str:
    """Why a fit that ended with this exit code has no result: the last error, or line, of its output."""
    folder = sweep.folder / trial.name
    if code == 0:
        return (
            f"the fit ended without {sweep.metric} in '{folder / REPORT}': the config must validate, keep a log (no"
            " trainer.logger: false), and have a metric of that name"
        )
    lines = [line.strip() for line in (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()]
    errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    return (errors or list(filter(None, lines)) or [f"exit code {code}"])[-1]


def _start(command: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a fit in a new process group, so that the terminal's signals reach only the sweep."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as screen:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=screen,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            process_group=0,
            # Two system calls of loaded libraries: no lock that another thread could hold.
            preexec_fn=_end_with_parent(os.getpid()) if sys.platform == "linux" else None,  # noqa: PLW1509
        )


def _end_with_parent(parent: int) -> Callable[[], None]:
    libc: Any = ctypes.CDLL(None)

    def request_signal() -> None:
        libc.prctl(SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has died in between
            os._exit(1)

    return request_signal


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a fit and its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def shares(jobs: int, gpus: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """For each of several parallel fits its part of the cores and of the GPUs, as environment variables.

    One alone has all. A number of threads that the environment sets stays.
    """
    if jobs == 1:
        return [{}]
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs)) if sys.platform == "linux" else "1"
    threads_option = {} if "OMP_NUM_THREADS" in environment else {"OMP_NUM_THREADS": threads}
    named = environment.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(i) for i in range(gpus)]
    shared = []
    for job in range(jobs):
        devices = names[job::jobs] or names[job % len(names) :][:1] if gpus else []
        shared.append({**threads_option, **({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {})})
    return shared


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
