"""Where one of several processes fails, all of them end: soon, with an exit code that is not 0, and with one line.

Left alone, the others wait in their next collective for the one that is gone: with gloo until the connection breaks,
with NCCL for half an hour. So the first that fails says so on a board, which is a part of the store by which torch's
processes found each other. A thread in each process reads it, also while the main thread is stuck, and ends the process
where that does not come out of its collective by itself.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy
from torch import distributed

from lora_lightning.lora.errors import LoRAError

FAILED, HEARD = "lora_lightning/failed", "lora_lightning/heard"
PERIOD, CLAIM, GRACE, ALONE = 0.5, 3.0, 10.0, 30.0
"""Seconds: between two looks at the board; for the one that failed to say so; for the main thread to come out of a
collective; and the same where the process that holds the board is gone, which may just have finished first."""
CODE = 2

BROKEN = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|Broken pipe|Socket Timeout|process group", re.I)


class LostProcessError(LoRAError):
    """Another process of the run was killed, or its machine is gone."""


class StoppedError(SystemExit):
    """Another process has failed, and has said why."""


@dataclass(frozen=True)
class Failure:
    """What stopped the run."""

    told_by: int
    """The process that says it to the user."""
    node: int
    text: str
    code: int = CODE
    """What the others exit with."""


_RUNS = itertools.count()
"""A fit after one that failed, in the same processes, has a board of its own; all of them count alike."""


class Board:
    """What all processes can read and write at any time, whatever their main threads wait for."""

    def __init__(self, run: int) -> None:
        self._failed_key, self._heard_key = f"{FAILED}/{run}", f"{HEARD}/{run}"
        store: Any = distributed.distributed_c10d._get_default_store()
        self._store = store.clone()  # a connection of this thread's own
        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()
        self._heard, self._lock = False, threading.Lock()

    def claim(self, failure: Failure) -> Failure:
        """The first failure counts: this one, or the one that was there."""
        text = self._store.compare_set(self._failed_key, "", json.dumps(asdict(failure)))
        return Failure(**json.loads(text))

    def read(self) -> Failure | None:
        if not self._store.check([self._failed_key]):
            return None
        return Failure(**json.loads(self._store.get(self._failed_key)))

    def hear(self) -> None:
        """Let the others know that this process knows; it is counted once, whichever thread says it first."""
        with self._lock:
            if not self._heard:
                self._heard = True
                self._store.add(self._heard_key, 1)

    def wait_until_heard(self) -> None:
        """The first process holds the board: it must not be gone before the others have read it."""
        limit = time.monotonic() + CLAIM
        while time.monotonic() < limit and self._store.add(self._heard_key, 0) < self.count:
            time.sleep(0.05)


class Watch(threading.Thread):
    """Looks at the board, and at the processes that this one has started."""

    def __init__(self, children: Sequence[subprocess.Popen[bytes]], node: int) -> None:
        super().__init__(daemon=True, name="lora-lightning-watch")
        self.children, self.node, self.number = children, node, next(_RUNS)
        self.board: Board | None = None
        self.failure: Failure | None = None
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(PERIOD):
            try:
                self.failure, grace = self._look(), GRACE
            except (RuntimeError, ValueError):  # the store is gone, and with it the process that held it
                if self.board is None:
                    continue  # torch takes the group down
                self.failure, grace = Failure(self.board.rank, self.node, lost(0, None)), ALONE
            if self.failure is not None:
                if not self._over.wait(grace):
                    self._end(self.failure)
                return

    def _look(self) -> Failure | None:
        if self.board is None:
            if not distributed.is_initialized() or distributed.get_world_size() == 1:
                return None
            self.board = Board(self.number)
        failure = self.board.read() or self._of_children(self.board)
        if failure is not None:
            self.board.hear()
        return failure

    def _of_children(self, board: Board) -> Failure | None:
        """A child that died without a word."""
        for number, child in enumerate(self.children):
            if child.poll():
                time.sleep(CLAIM / 2)  # its word may be on its way
                return board.read() or board.claim(Failure(board.rank, self.node, lost(number + 1, child.returncode)))
        return None

    def _end(self, failure: Failure) -> None:
        """Without the main thread, which is stuck."""
        if self.board is not None and self._tells(failure):
            print(f"lora-lightning: error: {failure.text}", file=sys.stderr, flush=True)
        os._exit(failure.code)

    def _tells(self, failure: Failure) -> bool:
        assert self.board is not None
        return failure.told_by == self.board.rank

    def stop(self) -> None:
        self._over.set()

    def settled(self, error: BaseException) -> BaseException:
        """What this process ends with, where `error` came out of its main thread."""
        if self.board is None:
            if not distributed.is_initialized() or distributed.get_world_size() == 1:
                return error
            with suppress(RuntimeError, ValueError):
                self.board = Board(self.number)
        if self.board is None:
            return error
        broken = is_broken(error)
        failure = self._waited() if broken else self.failure
        own = Failure(self.board.rank, self.node, lost(None, None) if broken else _line(error), _code(error))
        if failure is None:
            failure = own
            with suppress(RuntimeError):
                failure = self.board.claim(own)
        with suppress(RuntimeError):
            self.board.hear()
            if self.board.rank == 0:
                self.board.wait_until_heard()
        if not self._tells(failure):
            if failure.node != self.node and int(os.environ.get("LOCAL_RANK", "0")) == 0:
                print(f"lora-lightning: process {failure.told_by}: {failure.text}", file=sys.stderr, flush=True)
            return StoppedError(failure.code)
        return error if failure == own and not broken else LostProcessError(failure.text)

    def _waited(self) -> Failure | None:
        """Who broke the connection, if that is said within a moment."""
        limit = time.monotonic() + CLAIM
        while self.failure is None and time.monotonic() < limit:
            time.sleep(0.05)
        return self.failure


def leave_on_sigterm(trainer: Trainer) -> None:
    """Where there is nothing to save, SIGTERM to one of several processes ends all.

    Lightning's own answer is a collective within the signal's handler, which meets the others in the middle of another.
    """
    if isinstance(trainer.strategy, ParallelStrategy) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _leave)  # Lightning puts back what was there before


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def lost(rank: int | None, code: int | None) -> str:
    """What to say of a process that is gone without a word."""
    who = "another process" if rank is None else f"process {rank}"
    how = " is gone" if code is None else f" ended with exit code {code}"
    if code is not None and code < 0:
        how = f" was ended by signal {-code} ({signal.Signals(-code).name})"
    hint = ", as the system does where memory runs out" if code == -signal.SIGKILL else ""
    return f"{who}{how}{hint}: all processes stop; --ckpt_path last, or auto, goes on from the last checkpoint"


def is_broken(error: BaseException) -> bool:
    """Whether an error says no more than that another process does not answer."""
    if isinstance(error, LoRAError):
        return False
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and BROKEN.search(str(error)) is not None
    )


def _code(error: BaseException) -> int:
    """Where SIGTERM has ended one, it has ended all."""
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code else CODE


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def ending_together(trainer: Trainer, unless: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """What runs inside ends in all processes where it fails in one.

    Args:
        unless: with what all processes leave by themselves.
    """
    if not isinstance(trainer.strategy, ParallelStrategy):
        yield
        return
    children = getattr(trainer.strategy.launcher, "procs", [])
    started = [child for child in children if isinstance(child, subprocess.Popen)]
    _take_over()
    watch = Watch(started, trainer.node_rank)
    watch.start()
    try:
        yield
    except unless:
        raise
    except BaseException as error:
        ends_with = watch.settled(error)
        if ends_with is error:
            raise
        raise ends_with from error
    finally:
        watch.stop()


def _take_over() -> None:
    """Lightning's own thread would kill this process, unasked and without a word, once a child has failed."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer" and hasattr(thread, "_child_processes"):
            thread._child_processes = []
