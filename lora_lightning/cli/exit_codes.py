"""How the command ends: with one line that says why, and an exit code for the kind of end."""

from __future__ import annotations

import errno
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_lightning.cli.config_files import config_values
from lora_lightning.lora.errors import LoRAError, MissingPackageError, did_you_mean

DONE, FAILED, MISTAKE, SAVED, INTERRUPTED = 0, 1, 2, 75, 130
CODES = {
    DONE: "done",
    FAILED: "an exception in a class of your own or in this program: the line names its place",
    MISTAKE: "a mistake in what was asked: the line says what to do",
    SAVED: "stopped by SIGTERM after a checkpoint was saved: go on with --ckpt_path auto",
    INTERRUPTED: "stopped by Ctrl-C",
}
"""What each exit code means."""

CLOSED = 141
"""A shell's code for a program whose reader, such as `head`, has ended: this is no failure."""

DEBUG = "LORA_LIGHTNING_DEBUG"
"""The environment variable that shows tracebacks; `--debug` sets it, also for the processes that a command starts."""

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOENT}
"""A full disk, or a folder that cannot be written: the user can mend it, and the code is not at fault."""

KNOWN = (
    (
        r"out of memory|OutOfMemory",
        "the device's memory is full: lower the data's batch_size (and raise trainer.accumulate_grad_batches by as"
        " much), or set model.activation_checkpointing, or precision bf16-base",
    ),
    (
        r"No supported gpu backend found",
        "--trainer.accelerator gpu, and torch sees no GPU here: leave it at auto, or see lora-lightning doctor",
    ),
    (r"`(\w+)Accelerator` can not run on your system", "torch sees no {1} here: leave --trainer.accelerator at auto"),
    (
        r"requested gpu: (\[.*?\]).*machine only has: (\[.*?\])",
        "--trainer.devices asks for the GPUs {1}, and there are {2}: give as many as there are",
    ),
    (
        r"`devices` selected with `CPUAccelerator`|value is not a valid input using \w+ accelerator",
        "--trainer.devices must be a whole number above 0, a list of devices such as [0, 1], -1 or auto; on a CPU a"
        " whole number or auto",
    ),
    (r"Requirement '([\w.-]+)[^']*' not met\. HINT: Try running `(pip install [^`]*)`", "{1} is not installed: {2}"),
    (
        r"Target (-?\d+) is out of bounds",
        "a batch has the label {1}, for which the model has no output: number the data's labels from 0, or raise"
        " num_classes and the head's outputs",
    ),
    (
        r"device-side assert triggered",
        "a number was out of its range on the GPU, most often a label beyond num_classes or a token beyond the"
        " vocabulary: the same command with --trainer.accelerator cpu says which",
    ),
    (
        r"EADDRINUSE|address already in use",
        "the port of an earlier or another run is still taken: set MASTER_PORT to another one, or leave it unset",
    ),
    (
        r"argument after \*\* must be a mapping, not NoneType",
        "a section that holds keys, such as data.split, is set to null: leave it out for its defaults, or give it keys",
    ),
    (
        r"^(Invalid (?:learning rate|beta parameter|\w+_decay|eps|momentum).*)",
        "the optimizer says: {1}; see model.optimizer.init_args",
    ),
)
"""Messages of Lightning and torch about mistakes that a user can mend, and what to do."""


def explain_message(text: str) -> str | None:
    """Say what a message of Lightning or torch means for the user; None where it is not in `KNOWN`."""
    if match := re.search(r"selected an invalid accelerator name: `accelerator='(.*?)'`.*names are: ([^.]*)", text):
        names = sorted(["gpu", *match[2].split(", ")])
        return f"no accelerator '{match[1]}'{did_you_mean(match[1], names)} (there are {', '.join(names)})"
    for pattern, line in KNOWN:
        if match := re.search(pattern, text, re.IGNORECASE):
            return line.format(match[0], *match.groups())
    return None


def report_error(error: BaseException, args: Sequence[str] = ()) -> int:
    """Print in one line why the command ends, with the traceback if requested; returns the exit code.

    Args:
        error: the error that ends the command.
        args: the words of the command.
    """
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        traceback.print_exception(error)
    code, text = exit_code_and_line(error)
    if code == MISTAKE:
        text += _from_another_folder(text, args)
    if text:
        print(f"lora-lightning: error: {text}", file=sys.stderr)
    return code


def exit_code_and_line(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the line for an error."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "stopped by Ctrl-C"
    if isinstance(error, LoRAError | MissingPackageError):
        return MISTAKE, text
    if not is_raised_by_user(error):
        misconfigured = any(kind.__name__ == "MisconfigurationException" for kind in type(error).__mro__)
        known = explain_message(text) or (text if misconfigured else _explain_disk(error))
        if known is not None:
            return MISTAKE, known
    kind = type(error).__name__
    return FAILED, f"{kind}{f': {text}' if text else ''} ({_place(error)}; --debug shows the traceback)"


def _from_another_folder(text: str, args: Sequence[str]) -> str:
    """Add that a missing path is in a run's config, whose paths are relative to the current folder."""
    match = re.match(r"no (?:file|folder|model|directory|tokenizer) '?([^';:]+?)'?(?:[;:, ]|$)", text)
    if match is None or Path(match[1]).is_absolute():
        return ""
    from lora_lightning.cli.trained_run import with_run_config
    from lora_lightning.training.checkpoints import run_folder as run

    files = [Path(file) for file in config_values(with_run_config(list(args)))]
    config = next((file for file in reversed(files) if file.name == run.CONFIG and run.is_run(file.parent)), None)
    if config is None:
        return ""
    return (
        f" (the path stands in {config} and is taken from the folder where the command runs: run it where the fit ran,"
        " or give another, such as --data.path FILE)"
    )


def _explain_disk(error: BaseException) -> str | None:
    """Return the line for a disk's error, or that of a checkpoint's error before it; None for other errors."""
    if not isinstance(error, OSError) or error.errno not in DISK:
        return None
    if ours := [before for before in chain(error) if isinstance(before, LoRAError)]:
        return " ".join(str(ours[0]).split())
    file = f"'{_from_here(Path(error.filename))}'" if isinstance(error.filename, str) else "a file"
    if error.errno == errno.ENOTDIR:
        return f"{file} cannot be a folder, for a part of its path is a file: give another --runs_dir"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{file} cannot be written or read ({error.strerror}): change its rights, or give another --runs_dir"
    if error.errno == errno.ENOENT:
        return f"there is no {file}"
    return (
        f"{error.strerror}: {file}; make room or give another --runs_dir, and go on with --ckpt_path auto: checkpoints"
        " that were written are whole"
    )


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from, the last one first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# ---- whose code raised it, and where

PACKAGE = Path(__file__).parents[1]


def is_raised_by_user(error: BaseException) -> bool:
    """Return whether the user's code has raised it: then they need its type, message and place."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and _is_of_user(Path(frames[-1][0].f_code.co_filename))


def _place(error: BaseException) -> str:
    """Return `FILE:LINE, in FUNCTION` of the last frame in the user's code, else in ours, else of the last frame."""
    frames = [(Path(f.f_code.co_filename), line, f.f_code) for f, line in traceback.walk_tb(error.__traceback__)]
    of_user = [frame for frame in frames if _is_of_user(frame[0])]
    of_package = [frame for frame in frames if PACKAGE in frame[0].parents]
    for file, line, code in (of_user or of_package or frames)[-1:]:
        near = next((base for base in (Path.cwd(), PACKAGE.parent) if base in file.parents), None)
        shown = Path(*file.parts[-2:]) if near is None else file.relative_to(near)
        shown = Path(*file.parts[-2:]) if "site-packages" in shown.parts else shown
        return f"{shown}:{line}, in {code.co_qualname}"
    return "no place"


def _is_of_user(file: Path) -> bool:
    """Return whether a file of code is neither of this package nor of an installed one nor Python's."""
    others = {PACKAGE, Path(sysconfig.get_paths()["stdlib"])}
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    return file.is_file() and not installed and others.isdisjoint(file.parents)


def _from_here(file: Path) -> Path:
    return file.relative_to(Path.cwd()) if Path.cwd() in file.parents else file
