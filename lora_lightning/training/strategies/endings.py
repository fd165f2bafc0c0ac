"""How several processes end together.

Where one fails, the others would wait in their next collective for the one that is gone: with gloo until the connection
breaks, with NCCL for half an hour. torchrun, srun and the observer in Lightning's launcher end them from outside, and
cannot say in one line why. So the first process that fails writes that into torch's rendezvous store: it alone reports
its error, the others leave with its exit code. A thread in each process reads the store too, and ends the process where
its main thread is stuck.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import distributed
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.strategies.collectives import rank, world_size

PERIOD, CLAIM, GRACE = 0.5, 3.0, 10.0
"""Seconds between two reads of the store, for the process that failed first to write its claim, and for a main thread
to leave a collective."""
BROKEN = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|Broken pipe|Socket Timeout|process group", re.I)
"""Torch's errors where another process does not answer."""
FITS = itertools.count()
"""Number of the fit in these processes, the same in all: a fit after a failed one has another key in the store."""


class LostProcessError(LoRAError):
    """Another process of the run was killed or cannot be reached."""

    def __init__(self, end: str = "another process is gone") -> None:
        super().__init__(f"{end}: all processes stop; --ckpt_path last, or auto, goes on from the last checkpoint")


class StoppedError(SystemExit):
    """Another process has failed, and reports its error."""


class _Watch(threading.Thread):
    """Reads the process that failed first from torch's store, under one key: `rank:exit code`."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="lora-lightning-watch")
        self.key = f"lora_lightning/failed/{next(FITS)}"
        self.failed, self.over = threading.Event(), threading.Event()
        self.first: tuple[int, int] | None = None

    @functools.cached_property
    def store(self) -> Any:
        """This thread's connection; the main thread uses another."""
        return _store()

    def claim(self, code: int) -> None:
        """Register this process as the first that failed, unless another one is."""
        with suppress(RuntimeError, ValueError):  # the store is gone with the process that ran it
            first, _, exit_code = self.store.compare_set(self.key, "", f"{rank()}:{code}").decode().partition(":")
            self.first = int(first), int(exit_code)
            self.failed.set()

    def run(self) -> None:
        while not self.failed.is_set() and not self.over.wait(PERIOD):
            with suppress(RuntimeError, ValueError):
                if world_size() > 1 and self.store.check([self.key]):
                    self.claim(code=2)
        if self.first is not None and not self.over.wait(GRACE):  # the main thread is stuck
            os._exit(self.first[1])

    def error_to_end_with(self, error: BaseException) -> BaseException:
        """The error with which this process ends, where its main thread raised `error`."""
        if world_size() == 1:
            return error
        is_broken = isinstance(error, distributed.DistError | RuntimeError) and BROKEN.search(str(error)) is not None
        if is_broken:
            self.failed.wait(CLAIM)  # the process that broke the connection may claim
        self.claim(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code else 2)
        if rank() == 0:
            time.sleep(CLAIM)  # rank 0 may run the store, which the others have yet to read
        if self.first is not None and self.first[0] != rank():
            return StoppedError(self.first[1])
        return LostProcessError() if is_broken else error


def _store() -> Any:
    """A new connection to torch's store, once there is a process group."""
    store: Any = distributed.distributed_c10d._get_default_store()  # there is no public way to it
    return store.clone()


def all_arrive() -> bool:
    """Whether all processes call this within some seconds; by the store, for one may be stuck in a collective."""
    if world_size() == 1:
        return True
    store, key = _store(), f"lora_lightning/arrived/{next(FITS)}"
    arrived, limit = store.add(key, 1), time.monotonic() + 2 * CLAIM
    while arrived < world_size() and time.monotonic() < limit:
        time.sleep(0.05)
        arrived = store.add(key, 0)
    return bool(arrived == world_size())


@contextmanager
def in_all_processes(trainer: Trainer, unless: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Start the processes of a Trainer's strategy and their group; the block runs in each, as in `end_together`."""
    strategy = trainer.strategy
    if isinstance(strategy, ParallelStrategy):
        assert strategy.launcher is not None
        strategy.launcher.launch(strategy.setup_environment)
    with end_together(trainer, unless):
        yield


@contextmanager
def end_together(trainer: Trainer, unless: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Within the block, an error in one process ends all; with one of `unless` all leave by themselves."""
    if not isinstance(trainer.strategy, ParallelStrategy):
        yield
        return
    watch = _Watch()
    watch.start()
    try:
        yield
    except unless:
        raise
    except BaseException as error:
        final = watch.error_to_end_with(error)
        if final is error:
            raise
        raise final from error
    finally:
        watch.over.set()


def leave_on_sigterm(trainer: Trainer) -> None:
    """Let SIGTERM to one of several processes end all, where there is nothing to save.

    Lightning's handler runs a collective, which meets the other processes in the middle of another one.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if isinstance(trainer.strategy, ParallelStrategy) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)  # Lightning restores the handler from before


class _EndingLauncher(_MultiProcessingLauncher):
    """Lightning's launcher of forked and spawned processes, which passes SIGTERM to them and raises how they ended.

    Torch gives the parent an exit code or the text of a traceback.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Run `function` in all processes; a child's exit code is raised as SystemExit, its error as a LoRAError."""
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, self._pass_on) if is_main else None
        try:
            return super().launch(function, *args, trainer=trainer, **kwargs)
        except ProcessExitedException as error:
            code = error.exit_code
            if code < 0 and code != -signal.SIGTERM:
                hint = ", as the system does where memory runs out" if code == -signal.SIGKILL else ""
                name = signal.Signals(-code).name
                raise LostProcessError(f"process {error.error_index} was ended by {name}{hint}") from None
            raise StoppedError(128 + signal.SIGTERM if code < 0 else code) from None
        except ProcessRaisedException as error:
            kind, _, text = str(error).strip().splitlines()[-1].partition(": ")
            if not kind.startswith("lora_lightning."):
                raise
            raise LoRAError(text) from None
        finally:
            if is_main:
                signal.signal(signal.SIGTERM, before)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if not self.procs:
            raise SystemExit(128 + number)
        for process in self.procs:
            if process.is_alive():
                process.terminate()

    def _wrapping_function(self, process_idx: int, *args: Any, **kwargs: Any) -> None:
        """Run in a child process."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler is not for children
        try:
            super()._wrapping_function(process_idx, *args, **kwargs)
        except StoppedError:
            time.sleep(CLAIM)  # the parent ends all when the first is gone: let that be the one with the error
            raise


def use_ending_launcher(trainer: Trainer) -> None:
    """Use this launcher in place of Lightning's."""
    strategy: Any = trainer.strategy
    if type(strategy.launcher) is _MultiProcessingLauncher:
        strategy.launcher.__class__ = _EndingLauncher
