"""What several processes do together, and how they end together.

An error in one is raised in all (`together`, `agreed`), where all come to the same place. Where they do not, the others
would wait in their next collective for the one that is gone: with gloo until the connection breaks, with NCCL for half
an hour. So the first that fails notes it in the store by which torch's processes found each other, and a thread in each
process looks there, also while the main thread is stuck, and ends the process where that does not come out by itself
(`ending_together`). torchrun and srun do the same from outside; this one also says, in one line, what it was.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import distributed
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from lora_lightning.lora.errors import LoRAError

T = TypeVar("T")


def processes() -> int:
    """How many there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This one's number."""
    return distributed.get_rank() if processes() > 1 else 0


def gathered(own: Any) -> list[Any]:
    """Every process's object, in the order of their ranks."""
    if processes() == 1:
        return [own]
    values: list[Any] = [None] * processes()
    distributed.all_gather_object(values, own)
    return values


def agreed(problem: str | None) -> str | None:
    """The first problem that any process has, in all of them; each must call it."""
    return next((one for one in gathered(problem) if one is not None), None)


def together(run: Callable[[], T]) -> T:
    """This process's result, once all have one.

    Raises:
        LoRAError: the first error of any process, in all of them.
    """
    error: Exception | None = None
    try:
        value = run()
    except Exception as caught:  # whatever it is, the others must hear of it
        error = caught
    message = agreed(None if error is None else _line_of(error))
    if error is not None:
        raise error
    if message is not None:
        raise LoRAError(message)
    return value


def by_first(run: Callable[[], T]) -> T:
    """What process 0 finds, in all of them.

    Raises:
        LoRAError: its error, in all of them.
    """
    value = together(lambda: run() if rank() == 0 else None)
    if processes() > 1:
        held = [value]
        distributed.broadcast_object_list(held, src=0)
        value = held[0]
    return value  # type: ignore[return-value]


def _line_of(error: Exception) -> str:
    return str(error) if isinstance(error, LoRAError) else f"{type(error).__name__}: {error}"


# How they begin, where more than one fit is to run in them.


@contextmanager
def in_all_processes(trainer: Trainer, unless: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Within the block the processes of a Trainer's strategy are there, and their group, before any fit of it. What
    runs inside runs in each, and ends in all where it fails in one.

    Args:
        unless: with what all processes leave by themselves.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ParallelStrategy):
        assert strategy.launcher is not None
        strategy.launcher.launch(strategy.setup_environment)
    with ending_together(trainer, unless):
        yield


def all_arrive() -> bool:
    """Whether all processes come here within some seconds. By the store, for one may be stuck in a collective."""
    if processes() == 1:
        return True
    store, key = _store(), f"lora_lightning/arrived/{next(FITS)}"
    arrived, limit = store.add(key, 1), time.monotonic() + 2 * CLAIM
    while arrived < processes() and time.monotonic() < limit:
        time.sleep(0.05)
        arrived = store.add(key, 0)
    return bool(arrived == processes())


def _store() -> Any:
    """A connection of one's own to torch's store, once there is a process group."""
    store: Any = distributed.distributed_c10d._get_default_store()  # there is no public way to it
    return store.clone()


# How they end.

PERIOD, CLAIM, GRACE, ALONE = 0.5, 3.0, 10.0, 30.0
"""Seconds: between two looks at the store; for the one that failed to say so; for the main thread to come out of a
collective; and the same where the process that holds the store is gone, which may just have finished first."""
CODE = 2
BROKEN = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|Broken pipe|Socket Timeout|process group", re.I)
"""How torch says that another process does not answer."""
FITS = itertools.count()
"""A fit after one that failed, in the same processes, has an entry of its own; all of them count alike."""


class LostProcessError(LoRAError):
    """Another process of the run was killed, or its machine is gone."""


class StoppedError(SystemExit):
    """Another process has failed, and says why."""


def lost(number: int | None = None, code: int | None = None) -> str:
    """What to say of a process that is gone without a word."""
    who = "another process" if number is None else f"process {number}"
    how = "is gone" if code is None else f"ended with exit code {code}"
    if code is not None and code < 0:
        how = f"was ended by signal {-code} ({signal.Signals(-code).name})"
    hint = ", as the system does where memory runs out" if code == -signal.SIGKILL else ""
    return f"{who} {how}{hint}: all processes stop; --ckpt_path last, or auto, goes on from the last checkpoint"


class _Watch(threading.Thread):
    """Looks in torch's store for a process that has failed, and at the processes that this one has started.

    The store's entry is `rank:exit code` of the first that failed, which alone says why.
    """

    def __init__(self, children: list[subprocess.Popen[bytes]]) -> None:
        super().__init__(daemon=True, name="lora-lightning-watch")
        self.children, self.key = children, f"lora_lightning/failed/{next(FITS)}"
        self.over = threading.Event()
        self.first: tuple[int, int] | None = None
        self.line: str | None = None
        """What is to be said of a process that died without a word."""

    @functools.cached_property
    def store(self) -> Any:
        """For the main thread is at its own."""
        return _store()

    def claim(self, code: int) -> None:
        """Be the first that failed, unless another one was."""
        if self.first is None:
            first, _, its = self.store.compare_set(self.key, "", f"{rank()}:{code}").decode().partition(":")
            self.first = int(first), int(its)

    def run(self) -> None:
        grace = GRACE
        while self.first is None and not self.over.wait(PERIOD):
            try:
                self._look()
            except (RuntimeError, ValueError):  # the store is gone, and with it the process that held it
                self.first, self.line, grace = (rank(), CODE), lost(0), ALONE
        if self.first is not None and not self.over.wait(grace):  # the main thread is stuck
            if self.first[0] == rank() and self.line:
                print(f"lora-lightning: error: {self.line}", file=sys.stderr, flush=True)
            os._exit(self.first[1])

    def _look(self) -> None:
        dead = next(((i, c.returncode) for i, c in enumerate(self.children, 1) if c.poll()), None)
        if processes() > 1 and (dead is not None or self.store.check([self.key])):
            if dead is not None:
                time.sleep(CLAIM / 2)  # its word may be on its way
                self.line = lost(*dead)
            self.claim(CODE)

    def what_to_raise(self, error: BaseException) -> BaseException:
        """What this process ends with, where `error` came out of its main thread."""
        if processes() == 1:
            return error
        broken = isinstance(error, distributed.DistError | RuntimeError) and BROKEN.search(str(error)) is not None
        limit = time.monotonic() + CLAIM
        while broken and self.first is None and time.monotonic() < limit:  # who broke the connection may say so
            time.sleep(0.05)
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code else CODE
        with suppress(RuntimeError, ValueError):
            self.claim(code)
            heard, limit = self.store.add(f"{self.key}/heard", 1), time.monotonic() + CLAIM
            while rank() == 0 and heard < processes() and time.monotonic() < limit:  # the store is to live till then
                time.sleep(0.05)
                heard = self.store.add(f"{self.key}/heard", 0)
        if self.first is not None and self.first[0] != rank():
            return StoppedError(self.first[1])
        return LostProcessError(self.line or lost()) if broken else error


@contextmanager
def ending_together(trainer: Trainer, unless: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """What runs inside ends in all processes where it fails in one.

    Args:
        unless: with what all processes leave by themselves.
    """
    if not isinstance(trainer.strategy, ParallelStrategy):
        yield
        return
    children = [p for p in getattr(trainer.strategy.launcher, "procs", []) if isinstance(p, subprocess.Popen)]
    for thread in threading.enumerate():  # Lightning's would kill this process without a word once a child has failed
        if thread.name == "child-process-observer" and hasattr(thread, "_child_processes"):
            thread._child_processes = []
    watch = _Watch(children)
    watch.start()
    try:
        yield
    except unless:
        raise
    except BaseException as error:
        ends_with = watch.what_to_raise(error)
        if ends_with is error:
            raise
        raise ends_with from error
    finally:
        watch.over.set()


def leave_on_sigterm(trainer: Trainer) -> None:
    """Where there is nothing to save, SIGTERM to one of several processes ends all.

    Lightning's own answer is a collective within the signal's handler, which meets the others in the middle of another.
    """
    if isinstance(trainer.strategy, ParallelStrategy) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _leave)  # Lightning puts back what was there before


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


class _EndingLauncher(_MultiProcessingLauncher):
    """Lightning's launcher of forked and spawned processes: SIGTERM reaches them, and how they end is how the fit ends.

    Torch tells the parent no more than an exit code or a traceback as a text.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Run it in all processes.

        Raises:
            SystemExit: with the code of a child, such as that of a fit that was pre-empted.
            LoRAError: that of a child, or that one was killed.
        """
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, self._pass_on) if is_main else None
        try:
            return super().launch(function, *args, trainer=trainer, **kwargs)
        except ProcessExitedException as error:
            code = error.exit_code
            if code < 0 and code != -signal.SIGTERM:
                raise LostProcessError(lost(error.error_index, code)) from None
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
        """In a child."""
        if self._start_method == "fork":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not to pass on what it gets itself
        try:
            super()._wrapping_function(process_idx, *args, **kwargs)
        except StoppedError:
            time.sleep(CLAIM)  # the parent ends all at the first that is gone: let it be the one that says why
            raise


def end_as_they_end(trainer: Trainer) -> None:
    """Put this launcher in the place of Lightning's."""
    strategy: Any = trainer.strategy
    own = strategy.launcher
    if type(own) is _MultiProcessingLauncher:
        strategy._launcher = _EndingLauncher(strategy, start_method=own._start_method)
