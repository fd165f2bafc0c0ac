"""A trial as a process: `lora-lightning fit` with its screen in a file, that ends when the sweep does."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lightning.lora.errors import LoRAError

LOCK = ".lock"
PATIENCE = 60.0
"""Seconds that a fit has to write its checkpoint and leave, once it is asked to."""
FIT = (sys.executable, "-m", "lora_lightning", "fit")
ERROR = "lora-lightning: error: "
SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent dies, also by SIGKILL."""


@dataclass
class Fit:
    """A fit that runs."""

    process: subprocess.Popen[bytes]
    log: Path

    def code(self) -> int | None:
        """Its exit code, None while it runs."""
        return self.process.poll()

    def ask_to_leave(self) -> None:
        """SIGTERM: it saves its newest state and ends."""
        self._send(signal.SIGTERM)

    def end(self, patience: float = PATIENCE) -> None:
        """Ask it to leave, and make it where it does not."""
        self.ask_to_leave()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._send(signal.SIGKILL)
            self.process.wait()

    def _send(self, number: int) -> None:
        """To the process and those that it started."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return

    def fault(self) -> str:
        """What the user would have seen last, in one line."""
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()]
        told = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
        return (told or [line for line in lines if line] or [f"exit code {self.process.returncode}"])[-1]


def start(command: Sequence[str], log: Path, env: Mapping[str, str], lock: int) -> Fit:
    """Begin a fit, in a process group of its own: the sweep says when it ends, not the terminal."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as screen:
        process = subprocess.Popen(
            [*command],
            stdin=subprocess.DEVNULL,
            stdout=screen,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            process_group=0,
            pass_fds=[lock],
            # Two system calls, of what is loaded already: nothing that a thread could hold a lock of.
            preexec_fn=_end_with_parent(os.getpid()) if sys.platform == "linux" else None,  # noqa: PLW1509
        )
    return Fit(process, log)


def _end_with_parent(parent: int) -> Callable[[], None]:
    libc: Any = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has died in between
            os._exit(1)

    return ask


def shares(jobs: int, gpus: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """What each of several fits at once is told: its part of the cores, and of the GPUs.

    One alone has all. A number of threads that the environment sets stays.
    """
    if jobs == 1:
        return [{}]
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs)) if sys.platform == "linux" else "1"
    own = {} if "OMP_NUM_THREADS" in environment else {"OMP_NUM_THREADS": threads}
    named = environment.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(i) for i in range(gpus)]
    found = []
    for job in range(jobs):
        mine = names[job::jobs] or names[job % len(names) :][:1] if gpus else []
        found.append({**own, **({"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {})})
    return found


@contextmanager
def locked(sweep: Path) -> Iterator[int]:
    """Within the block no other sweep works in this folder; the fits hold the lock too, for as long as they live.

    Raises:
        LoRAError: another sweep, or a fit that one has left behind, is at work and does not end.
    """
    sweep.mkdir(parents=True, exist_ok=True)
    held = os.open(sweep / LOCK, os.O_CREAT | os.O_RDWR)
    try:
        _take(held, sweep)
        yield held
    finally:
        os.close(held)


def _take(held: int, sweep: Path) -> None:
    """A fit whose sweep was killed saves and ends; it is waited for."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if _is_alive(held) or time.monotonic() > until:
                raise LoRAError(
                    f"another sweep, or a fit of one, works in '{sweep}': wait for its end, or give another --name"
                ) from error
            time.sleep(0.2)
        else:
            os.ftruncate(held, 0)
            os.pwrite(held, str(os.getpid()).encode(), 0)
            return


def _is_alive(held: int) -> bool:
    """Whether the sweep that took the lock last still runs."""
    noted = os.pread(held, 32, 0)
    if not noted.isdigit():
        return True
    try:
        os.kill(int(noted), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
