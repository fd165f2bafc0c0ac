"""Processes that Python spawns or forks (`ddp_spawn`, `ddp-fork.yaml`): how they end is how the fit ends.

Torch tells their parent no more than an exit code, or a traceback as a text, and passes no signal on. Here SIGTERM to
the parent reaches all of them, and their error, or the code that asks to be started again, is the parent's.
"""

from __future__ import annotations

import pickle
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.checkpoints.model_checkpoint import PreemptedError
from lora_lightning.training.ending import CLAIM, CODE, LostProcessError, StoppedError, lost

TOLD = (LoRAError, PreemptedError, MisconfigurationException, OSError)
"""What the command says in one line; of anything else torch hands over the traceback."""


class EndingLauncher(_MultiProcessingLauncher):
    """Lightning's launcher, which raises in the parent what was raised in a child."""

    _told: Path | None = None
    """A folder for what a child has to say; the launcher goes to each of them with its path."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Run it in all processes.

        Raises:
            PreemptedError: SIGTERM came, and all is saved.
            LoRAError: that of a child, or that one was killed.
        """
        self._told = Path(tempfile.mkdtemp(prefix="lora-lightning-"))
        try:
            with self._passing_sigterm_on():
                return super().launch(function, *args, trainer=trainer, **kwargs)
        except ProcessException as error:
            raise self._meant(error) from None
        finally:
            shutil.rmtree(self._told, ignore_errors=True)

    @contextmanager
    def _passing_sigterm_on(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._pass_on)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _pass_on(self, number: int, frame: Any) -> None:
        if not self.procs:
            raise SystemExit(128 + number)
        for process in self.procs:
            if process.is_alive():
                process.terminate()

    def _meant(self, error: ProcessException) -> BaseException:
        """What the exit of a child stands for; whose code is that of the first to end, not of the one that failed."""
        assert self._told is not None
        code = error.exit_code if isinstance(error, ProcessExitedException) else 1
        if code == -signal.SIGTERM:
            return SystemExit(128 + signal.SIGTERM)
        if code < 0:
            return LostProcessError(lost(error.error_index, code))
        for file in sorted(self._told.glob("*.pickle")):
            found: BaseException = pickle.loads(file.read_bytes())
            return found
        return error if code == 1 else StoppedError(code)

    def _wrapping_function(self, process_idx: int, *args: Any, **kwargs: Any) -> None:
        """In a child."""
        if self._start_method == "fork":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not to pass on what it gets itself
        try:
            super()._wrapping_function(process_idx, *args, **kwargs)
        except StoppedError:
            self._wait_for_a_word()
            raise
        except TOLD as error:
            code = error.code if isinstance(error, PreemptedError) else CODE
            if code:  # of a pre-empted fit only one process has one
                self._tell(process_idx, error)
            raise SystemExit(code) from error

    def _tell(self, process_idx: int, error: BaseException) -> None:
        assert self._told is not None
        aside = self._told / f"{process_idx}.part"
        with suppress(OSError):  # a full disk; the exit code is left
            aside.write_bytes(_pickled(error))
            aside.replace(aside.with_suffix(".pickle"))

    def _wait_for_a_word(self) -> None:
        """The parent ends all at the first that is gone, also the one that has failed and is about to say why."""
        assert self._told is not None
        limit = time.monotonic() + CLAIM
        while time.monotonic() < limit and not any(self._told.glob("*.pickle")):
            time.sleep(0.02)


def _pickled(error: BaseException) -> bytes:
    """Itself, or its text where its class takes other arguments."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # whatever a class of its own raises
        return pickle.dumps(LoRAError(str(error)))
    return data


def end_as_they_end(trainer: Trainer) -> None:
    """Put this launcher in the place of Lightning's."""
    strategy: Any = trainer.strategy
    own = strategy.launcher
    if type(own) is _MultiProcessingLauncher:
        strategy._launcher = EndingLauncher(strategy, start_method=own._start_method)
