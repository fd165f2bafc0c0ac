"""Write files and folders atomically: beside their place, to which they are moved once they are complete."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import platform
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from lora_lightning.lora.errors import AdapterError, LoRAError

Content = bytes | Iterable[bytes | memoryview]
"""The content of a file, in one piece or piece by piece."""


def write_bytes(path: Path, content: Content) -> None:
    """Write a file: a reader sees the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path, _writer(content)) as part:
        part.replace(path)


def write_together(directory: Path, files: Mapping[str, Content]) -> None:
    """Write files that belong together into a directory; its other files stay.

    A reader opens the last of `files` first. So the old file of that name is removed before the others, and the new one
    is added after them: whenever the process is killed, the directory holds the old files, the new ones, or none under
    that name, and never a mixture. The folder itself is not replaced: it may be a mount point or hold other files.

    Raises:
        AdapterError: the files cannot be written. The directory is then unchanged.
    """
    is_new = not directory.exists()
    paths = {directory / name: content for name, content in files.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if in_the_way := next((path for path in paths if path.is_dir()), None):
            raise IsADirectoryError(f"{in_the_way} is a directory")
        for path in paths:
            clear_leftovers(path)
        with contextlib.ExitStack() as stack:
            exchange({path: stack.enter_context(write_aside(path, _writer(each))) for path, each in paths.items()})
    except OSError as error:
        if is_new:
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise AdapterError(
            f"'{directory}' cannot be written ({error}): expected a directory, old or new, on a disk with space left;"
            " what was there is as it was"
        ) from error


@contextlib.contextmanager
def write_aside(path: Path, write: Callable[[BinaryIO], object]) -> Iterator[Path]:
    """Write a hidden file beside `path` and sync it; the block may move it, and it is not left after the block."""
    part = hidden_path(path, "new")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield part
    finally:
        part.unlink(missing_ok=True)


def _writer(content: Content) -> Callable[[BinaryIO], None]:
    return lambda file: file.writelines([content] if isinstance(content, bytes) else content)


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
    match = re.search(r"os error (\d+)", str(error))  # safetensors' messages, from Rust
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


def exchange(new: Mapping[Path, Path]) -> None:
    """Move old files or folders away, the last one first, and the new ones in; undo everything if a step fails."""
    old = {path: hidden_path(path, "old") for path in new}
    try:
        for path in reversed(list(new)):
            if path.exists():
                path.replace(old[path])
        for path, part in new.items():
            part.replace(path)
    except BaseException:
        for path, part in new.items():
            if not part.exists():  # it was moved
                _remove(path)
            if old[path].exists():
                old[path].replace(path)
        raise
    for part in old.values():
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def clear_leftovers(target: Path) -> None:
    """Remove what ended processes of this machine left beside `target`; a folder that is missing is put back."""
    form = re.compile(rf"\.{re.escape(target.name)}\.{re.escape(_host())}\.(\d+)\.(new|old)\.part")
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        parsed = form.fullmatch(path.name)
        if parsed is None or path.is_symlink() or _runs(int(parsed[1])):
            continue
        # No file, which could then stand beside newer ones.
        if path.is_dir() and parsed[2] == "old" and not target.exists():
            path.replace(target)
        else:
            _remove(path)


def refuse_occupied(folder: Path, what: str, *marks: str) -> None:
    """Raise a LoRAError where something else than `what`, which has one of the files `marks`, would be replaced."""
    if folder.is_file():
        raise LoRAError(f"'{folder}' is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / mark).is_file() for mark in marks):
        raise LoRAError(f"'{folder}' holds files that are not {what}: name an empty or new folder")


def hidden_path(target: Path, kind: str) -> Path:
    """A hidden name beside `target` with the machine and the process, since other machines may share the disk."""
    return target.with_name(f".{target.name}.{_host()}.{os.getpid()}.{kind}.part")


def _host() -> str:
    return platform.node() or "localhost"


def _runs(pid: int) -> bool:
    """Whether another process with this number runs."""
    if sys.platform == "win32":  # where `os.kill` would end it
        return pid != os.getpid()
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return pid != os.getpid()


def human_size(size: float) -> str:
    """`22.7 MB`; 1 kB is 1000 bytes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
