"""How a failure is run and judged.

A module of this folder has `TITLE`, `THREAD` (owner/repository#number), `WARNS` (a regular expression that a warning
about this failure would match) and one function for each of three ways: `ours`, `peft` and `lightning`. Each function
gets an empty folder, does what a user would do, and returns what it measured. The outcome follows from that alone:

- right: the number is as it should be;
- refused: it raised an error of the library, and did nothing wrong before;
- warned: the number is wrong, and a warning or a log line of level WARNING speaks of it;
- silently wrong: the number is wrong, and nothing was said.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import pkgutil
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

import benchmarks.silent_failures as here

WAYS = {"ours": "lora_lightning", "peft": "PEFT + HF Trainer", "lightning": "plain Lightning"}
REFUSALS = (ValueError, RuntimeError, KeyError, MisconfigurationException)
"""What libraries raise to refuse. Any other error is a mistake in the program that was to show a failure."""


@dataclass(frozen=True)
class Measured:
    """What a run gave: whether the number is right, and the number in a few words."""

    right: bool
    shown: str


@dataclass
class Outcome:
    kind: str
    shown: str
    said: list[str] = field(default_factory=list)
    """The warnings that speak of the failure, or the first line of the error."""
    others: list[str] = field(default_factory=list)
    """All other warnings, so that it can be looked up what was not counted."""
    seconds: float = 0.0


def failures() -> dict[str, ModuleType]:
    """All failures by name, folder by folder."""
    names = [
        module.name
        for module in pkgutil.walk_packages(here.__path__, f"{here.__name__}.")
        if not module.ispkg and module.name.count(".") == 3
    ]
    order = ("targets", "training", "files", "merging")
    names.sort(key=lambda name: (order.index(name.split(".")[2]), name))
    return {name.rpartition(".")[2]: importlib.import_module(name) for name in names}


def judge(run: Callable[[Path], Measured], warns: str) -> Outcome:
    """Run one way in a folder of its own and say what came of it."""
    torch.manual_seed(0)
    start, before = time.perf_counter(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder, heard() as said:
        os.chdir(folder)  # nobody's default folder for logs and checkpoints is the user's
        try:
            measured = run(Path(folder))
            error = None
        except REFUSALS as raised:
            error = raised
        finally:
            os.chdir(before)
    seconds = time.perf_counter() - start
    if error is not None:
        line = (str(error).strip() or repr(error)).splitlines()[0]
        return Outcome("refused", type(error).__name__, [line], said, seconds)
    own = [text for text in said if re.search(warns, text, re.I)]
    kind = "right" if measured.right else "warned" if own else "silently wrong"
    return Outcome(kind, measured.shown, own, [text for text in said if text not in own], seconds)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """All that is warned of or logged at WARNING and above, once each; what is printed is dropped."""
    said: list[str] = []

    def note(text: str) -> None:
        line = " ".join(text.split())
        if line not in said:
            said.append(line)

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(record.getMessage())

    ear = Ear(logging.WARNING)
    names = ("", "transformers", "lightning.pytorch", "lightning.fabric", "peft")
    loggers = [logging.getLogger(name) for name in names]
    own = [(handler, handler.level) for logger in loggers for handler in logger.handlers]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: note(str(message))
        for handler, level in own:  # to the screen; the ear hears them
            handler.setLevel(logging.CRITICAL + 1)
            stack.callback(handler.setLevel, level)
        for logger in loggers:
            logger.addHandler(ear)
            stack.callback(logger.removeHandler, ear)
        yield said


def link(thread: str) -> str:
    """`owner/repository#number` as a link that shows the repository and the number."""
    place, _, number = thread.partition("#")
    return f"[{place.partition('/')[2]} #{number}](https://github.com/{place}/issues/{number})"


def table(rows: dict[str, dict[str, Outcome]]) -> str:
    """The outcomes as a table in Markdown, numbers beside what is wrong, and below it what was said."""
    modules = failures()
    lines = [f"| failure | thread | {' | '.join(WAYS.values())} |", "|---|---|---|---|---|"]
    for name, found in rows.items():
        module = modules[name]
        cells = " | ".join(cell(found[way]) for way in WAYS)
        lines.append(f"| `{name}`: {module.TITLE} | {link(module.THREAD)} | {cells} |")
    counts = {way: [found[way].kind for found in rows.values()] for way in WAYS}
    for kind in ("right", "refused", "warned", "silently wrong"):
        lines.append(f"| {kind} | | {' | '.join(str(kinds.count(kind)) for kinds in counts.values())} |")
    return "\n".join(lines)


def cell(outcome: Outcome) -> str:
    if outcome.kind in ("right", "refused"):
        return outcome.kind
    kind = f"**{outcome.kind}**" if outcome.kind == "silently wrong" else outcome.kind
    return f"{kind}: {outcome.shown}"


def words(rows: dict[str, dict[str, Outcome]]) -> str:
    """For each refusal and warning its first line."""
    lines = []
    for name, found in rows.items():
        for way, outcome in found.items():
            if outcome.kind in ("refused", "warned"):
                lines.append(f"{name}, {WAYS[way]}, {outcome.kind}: {outcome.said[0][:200]}")
    return "\n".join(lines)
