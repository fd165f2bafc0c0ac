"""A trial as a process: `lora-lightning fit` with its output in a file, which ends when the sweep does."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 60.0
"""Seconds that a fit has to write its checkpoint and end after SIGTERM."""
FIT = (sys.executable, "-m", "lora_lightning", "fit")
ERROR = "lora-lightning: error: "
SET_PDEATHSIG = 1
"""The option of Linux's prctl that sets the signal a process gets when its parent dies, also by SIGKILL."""


@dataclass
class Fit:
    """A running fit in a new process group, so that the terminal's signals reach only the sweep."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, command: Sequence[str], log: Path, env: Mapping[str, str]) -> Fit:
        """Start the fit, with its output appended to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as screen:
            process = subprocess.Popen(
                [*command],
                stdin=subprocess.DEVNULL,
                stdout=screen,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                process_group=0,
                # Two system calls of loaded libraries: no lock that another thread could hold.
                preexec_fn=_end_with_parent(os.getpid()) if sys.platform == "linux" else None,  # noqa: PLW1509
            )
        return cls(process, log)

    def ask_to_leave(self) -> None:
        """Send SIGTERM: the fit saves its newest state and ends."""
        self._send(signal.SIGTERM)

    def end(self) -> None:
        """Wait for the fit to end, and kill it where it does not."""
        try:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE)
        finally:
            self._send(signal.SIGKILL)
            self.process.wait()

    def fault(self) -> str:
        """The last error or line of the output."""
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()]
        errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
        return (errors or [line for line in lines if line] or [f"exit code {self.process.returncode}"])[-1]

    def _send(self, number: int) -> None:
        """Send a signal to the process and its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def _end_with_parent(parent: int) -> Callable[[], None]:
    libc: Any = ctypes.CDLL(None)

    def request_signal() -> None:
        libc.prctl(SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has died in between
            os._exit(1)

    return request_signal


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
