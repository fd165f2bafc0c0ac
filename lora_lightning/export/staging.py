"""A folder that is written aside and then replaces its target in one step, with room on the disk checked before."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats.atomic_dir import clear_leftovers, exchange, hidden_path, human_size

RUST = re.compile(r"os error (\d+)")
"""The number of an OS error in the messages of safetensors, which is written in Rust."""


@contextlib.contextmanager
def stage_folder(target: Path, needed: int) -> Iterator[Path]:
    """A folder to write into, which replaces `target` at the end of the block.

    If the block raises, `target` is unchanged and the folder is removed. If the process is killed, `target` is never
    half written, and the next call removes what is left.

    Args:
        needed: roughly the bytes that will be written.

    Raises:
        LoRAError: too little space, before the first byte or in the middle.
    """
    target = target.resolve() if target.is_symlink() else target.absolute()
    if os.path.ismount(target):
        raise LoRAError(
            f"'{target}' is a mount point, which cannot be replaced: name a folder in it ('{target}/export')"
        )
    clear_leftovers(target)
    disk = next(path for path in (target, *target.parents) if path.exists())
    if (free := shutil.disk_usage(disk).free) < needed:
        raise LoRAError(
            f"'{target}' needs about {human_size(needed)} and '{disk}' has {human_size(free)} free: free some, or name"
            " another --output_dir; nothing was written"
        )
    aside = hidden_path(target, "new")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        _sync(aside)
        exchange({target: aside})
    except Exception as error:
        if advice := _disk_advice(error, target, f"{human_size(needed)} are needed, {human_size(free)} were free"):
            raise LoRAError(advice) from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Sync every file of the folder to disk, with the umask's permissions: safetensors gives them to the owner only."""
    sample = folder / ".rights"
    sample.touch()
    rights = stat.S_IMODE(sample.stat().st_mode)
    sample.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(rights)
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def _disk_advice(error: Exception, target: Path, sizes: str) -> str | None:
    """The message for a disk's error while writing `target`; None for any other error."""
    match = RUST.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space was left for '{target}' ({sizes}): nothing was written; free some, or name another --output_dir"
        )
    if number == errno.EFBIG:
        cure = "nothing was written; raise it (ulimit -f), or split the weights by --max_shard_size"
        return f"a file in '{target}' would be beyond this process's limit on file sizes: {cure}"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        cure = "nothing was; name a folder that may be written, --output_dir"
        return f"'{target}' cannot be written ({os.strerror(number)}): {cure}"
    return None
