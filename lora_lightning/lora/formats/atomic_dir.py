"""A folder that is whole or absent: written beside its place, and moved there in one step."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from lora_lightning.lora.errors import LoRAError

NO_SPACE = ("os error 28", "os error 122", "No space left on device", "Disk quota exceeded")
"""How safetensors, which is written in Rust, says ENOSPC and EDQUOT."""


@contextlib.contextmanager
def staged(target: Path, needed: int) -> Iterator[Path]:
    """A folder to write into, which takes the place of `target` once the block is through.

    Where the block raises, `target` is as it was and nothing new is left. What a process that was killed left behind
    is cleared away by the next; of its `target`, no part is ever seen half.

    Args:
        needed: bytes that will be written, about.

    Raises:
        LoRAError: too little space, before the first byte or in the middle.
    """
    target = target.absolute()
    if target.is_symlink():
        target = target.resolve()
    if os.path.ismount(target):
        raise LoRAError(
            f"'{target}' is a mount point, which cannot be replaced: name a folder in it ('{target}/export')"
        )
    with aside_of(target, needed) as aside:
        yield aside
        _sync(aside)
        _move(aside, target)


@contextlib.contextmanager
def aside_of(target: Path, needed: int = 0) -> Iterator[Path]:
    """A folder beside `target` for what the block itself moves into place; it is gone afterwards.

    Raises:
        LoRAError: as for `staged`.
    """
    target = target.absolute()
    clear_leftovers(target)
    check_space(target, needed)
    aside = _beside(target, "new")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
    except Exception as error:
        if is_no_space(error):
            free = human_size(_free(target)[0])
            raise LoRAError(
                f"no space was left for '{target}' ({human_size(needed)} are needed, {free} are free now): nothing was"
                " written; free some, or name another --output_dir"
            ) from error
        if isinstance(error, PermissionError):
            raise LoRAError(
                f"'{target}' cannot be written ({error.strerror or error}): nothing was; name a folder that may be"
                " written, --output_dir"
            ) from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_space(target: Path, needed: int) -> None:
    """Raise where the disk of `target` has less than `needed` bytes free."""
    free, disk = _free(target)
    if free < needed:
        raise LoRAError(
            f"'{target}' needs about {human_size(needed)} and '{disk}' has {human_size(free)} free: free some, or name"
            " another --output_dir; nothing was written"
        )


def _free(target: Path) -> tuple[int, Path]:
    disk = next(path for path in (target, *target.parents) if path.exists())
    return shutil.disk_usage(disk).free, disk


def is_no_space(error: Exception) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(text in str(error) for text in NO_SPACE)


def human_size(size: float) -> str:
    """`22.7 MB`; 1 kB is 1000 bytes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def clear_leftovers(target: Path) -> None:
    """Remove what processes of this machine that are no more left beside `target`.

    A folder that was moved away for one that never came is put back.
    """
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        form = rf"\.{re.escape(target.name)}\.{re.escape(_host())}\.(\d+)\.(new|old)\.part"
        found = re.fullmatch(form, path.name)
        if found is None or path.is_symlink() or _runs(int(found[1])):
            continue
        if found[2] == "old" and not target.exists():
            path.replace(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _beside(target: Path, kind: str) -> Path:
    """Hidden, and named after its process: on a shared disk the number alone would not say whose."""
    return target.with_name(f".{target.name}.{_host()}.{os.getpid()}.{kind}.part")


def _host() -> str:
    return platform.node() or "localhost"


def _runs(pid: int) -> bool:
    """Whether another process of this number lives."""
    if pid == os.getpid():
        return False
    if sys.platform == "win32":  # there the question would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _sync(folder: Path) -> None:
    """Have the disk hold every file before the folder gets its name."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def _move(aside: Path, target: Path) -> None:
    """An older folder goes only once the new one stands."""
    old = _beside(target, "old")
    if target.exists():
        target.replace(old)
    try:
        aside.replace(target)
    except BaseException:
        if old.exists():
            old.replace(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
