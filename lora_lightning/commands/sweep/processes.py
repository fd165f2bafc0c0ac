"""A trial as a process: `lora-lightning fit` with its screen in a file, that ends when the sweep does."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 60.0
"""Seconds that a fit has to write its checkpoint and leave, once it is asked to."""
FIT = (sys.executable, "-m", "lora_lightning", "fit")
ERROR = "lora-lightning: error: "
SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent dies, also by SIGKILL."""


@dataclass
class Fit:
    """A fit that runs, in a process group of its own: the sweep says when it ends, not the terminal."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, command: Sequence[str], log: Path, env: Mapping[str, str]) -> Fit:
        """Begin it, with its screen added to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as screen:
            process = subprocess.Popen(
                [*command],
                stdin=subprocess.DEVNULL,
                stdout=screen,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                process_group=0,
                # Two system calls, of what is loaded already: nothing that a thread could hold a lock of.
                preexec_fn=_end_with_parent(os.getpid()) if sys.platform == "linux" else None,  # noqa: PLW1509
            )
        return cls(process, log)

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def ask_to_leave(self) -> None:
        """Send SIGTERM: it saves its newest state and ends."""
        self._send(signal.SIGTERM)

    def end(self) -> None:
        """Wait for it to leave, and make it where it does not."""
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._send(signal.SIGKILL)
            self.process.wait()

    def fault(self) -> str:
        """What the user would have seen last, in one line."""
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()]
        errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
        return (errors or [line for line in lines if line] or [f"exit code {self.process.returncode}"])[-1]

    def _send(self, number: int) -> None:
        """To the process and those that it started."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return


def _end_with_parent(parent: int) -> Callable[[], None]:
    libc: Any = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has died in between
            os._exit(1)

    return ask


def shares(jobs: int, gpus: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """For each of several fits at once its part of the cores and of the GPUs, as environment variables.

    One alone has all. A number of threads that the environment sets stays.
    """
    if jobs == 1:
        return [{}]
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs)) if sys.platform == "linux" else "1"
    thread_limit = {} if "OMP_NUM_THREADS" in environment else {"OMP_NUM_THREADS": threads}
    named = environment.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(i) for i in range(gpus)]
    shared = []
    for job in range(jobs):
        mine = names[job::jobs] or names[job % len(names) :][:1] if gpus else []
        shared.append({**thread_limit, **({"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {})})
    return shared
