"""A fit that pauses between its steps while others go on.

Lightning's loop cannot be left and entered again, so each fit runs in a thread, and at most one thread goes on at a
time. Random states and the screen, of which a process has one, are set for the fit whose turn it is. So a fit computes
what it computes alone.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from lora_lightning.training.checkpoints.rng_state import random_state, set_random_state
from lora_lightning.training.population.heap import share_heap


class Turns:
    """A fit `run`, which calls `pause` where others may go on, with its random states and the file it prints to."""

    def __init__(self, run: Callable[[], object], random: dict[str, Any], log: Path | None = None) -> None:
        share_heap()
        self._log, self._random = log, random
        self._threads = torch.get_num_threads()
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.is_over = False
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run, run), daemon=True)
        self._thread.start()

    def _run(self, run: Callable[[], object]) -> None:
        self._go.acquire()
        torch.set_num_threads(self._threads)  # torch keeps their number by thread
        try:
            run()
        except BaseException as error:  # an error ends this fit alone
            self.error = error
        self.is_over = True
        self._back.release()

    def pause(self) -> None:
        """Called in the fit: let others go on until its next turn."""
        self._back.release()
        self._go.acquire()

    def resume(self) -> None:
        """Let the fit go on until it pauses or is over."""
        before = random_state()
        set_random_state(self._random)
        try:
            with ExitStack() as stack:
                if self._log is not None:
                    self._log.parent.mkdir(parents=True, exist_ok=True)
                    file = stack.enter_context(self._log.open("a", encoding="utf-8"))
                    stack.enter_context(redirect_stdout(file))
                    stack.enter_context(redirect_stderr(file))
                self._go.release()
                self._back.acquire()
            if self.is_over:
                self._thread.join()
        finally:
            self._random = random_state()
            set_random_state(before)
