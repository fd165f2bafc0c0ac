"""Checkpoint files that are whole or absent.

A file is the zip that `torch.save` writes; torch does not compare its checksums, so this module does. It is written
aside, synced and moved. The file before it stays as `NAME.ckpt.previous`, and is read where the newer one is damaged.
"""

from __future__ import annotations

import functools
import os
import pickle
import re
import shutil
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.lora.errors import LoRAError, first_line
from lora_lightning.lora.formats.atomic_dir import clear_leftovers, hidden_path, write_aside

PREVIOUS = ".previous"
FOREIGN = re.compile(r"(?:GLOBAL|global|class|function) `?([\w.]+\.[\w.]+)")
"""The name in torch's error about a pickle that would run code."""


class DamagedCheckpointError(LoRAError):
    """A checkpoint file that is incomplete or corrupt."""


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a whole file, and keep the earlier one as `NAME.previous`; an error leaves the earlier one as it was."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path)
        with write_aside(path, functools.partial(torch.save, content)) as part:
            _keep_previous(path)
            part.replace(path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a failed write
        cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__ or error
        raise LoRAError(
            f"the checkpoint '{path}' could not be written ({first_line(cause)}): make room there or give another"
            " --runs_dir, and go on with --ckpt_path last; older checkpoints are as they were"
        ) from error


def _sync(folder: Path) -> None:
    """Sync a folder, so that a move in it survives a crash; not every system can open folders."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _keep_previous(path: Path) -> None:
    """Give the file that is about to be replaced a second name, so that one always exists.

    A damaged file does not replace the one before it, from which this fit may have resumed.
    """
    try:
        check_whole(path)
    except (FileNotFoundError, DamagedCheckpointError):
        return
    second = hidden_path(path, "old")
    try:
        try:
            second.hardlink_to(path)
        except OSError:  # a file system without links
            shutil.copyfile(path, second)
        second.replace(path.with_name(path.name + PREVIOUS))
    finally:
        second.unlink(missing_ok=True)


def check_whole(path: Path) -> None:
    """Raise unless every entry of the file matches its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise DamagedCheckpointError(f"'{path}' is not a whole checkpoint: '{damaged}' fails its checksum")
    except FileNotFoundError:
        raise
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise DamagedCheckpointError(f"'{path}' is not a whole checkpoint ({first_line(error)})") from error


def whole_file(path: Path) -> Path:
    """The file itself, or with a warning the one before it, where it is damaged or missing."""
    before = path.with_name(path.name + PREVIOUS)
    try:
        check_whole(path)
    except (FileNotFoundError, DamagedCheckpointError) as error:
        if not before.exists():
            raise
        check_whole(before)
        rank_zero_warn(f"{error}; the one before it is used: '{before}'")
        return before
    return path


def read_checkpoint(path: Path, *, weights_only: bool = True, map_location: Any = "cpu") -> Any:
    """Read a checkpoint of `write_checkpoint` or plain Lightning, or the one before it where it is damaged."""
    file = whole_file(path)
    try:
        return torch.load(file, map_location=map_location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        name = FOREIGN.search(str(error))
        what = f": it names {name[1]}" if name else ""
        raise DamagedCheckpointError(
            f"'{file}' is no checkpoint of lora_lightning: it holds more than tensors and plain values{what}; nothing"
            " of it was run"
        ) from None
    except (RuntimeError, EOFError, KeyError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise DamagedCheckpointError(f"'{file}' is not a whole checkpoint ({first_line(error)})") from error


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoint plugin, with the functions above for local files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if is_remote(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only)
        only = weights_only is not False
        return read_checkpoint(Path(path), weights_only=only, map_location=map_location)  # type: ignore[no-any-return]

    def remove_checkpoint(self, path: str | Path) -> None:
        super().remove_checkpoint(path)
        if not is_remote(path):
            Path(f"{path}{PREVIOUS}").unlink(missing_ok=True)


def is_remote(path: str | Path) -> bool:
    """Whether the path is a URL for fsspec."""
    return "://" in str(path)
