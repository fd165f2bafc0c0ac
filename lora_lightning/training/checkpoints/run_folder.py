"""Run folders: `runs/<name>/<version>/` with config.yaml, checkpoints/, metrics.csv, the reports and the export."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.lora.errors import LoRAError, did_you_mean, first_few, near_misses, suggestion
from lora_lightning.lora.formats.atomic_dir import write_bytes
from lora_lightning.reports import html
from lora_lightning.training.checkpoints.file_io import PREVIOUS, read_checkpoint

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

CONFIG, REPORT, PAGE = html.CONFIG, html.REPORT, html.PAGE
CHECKPOINTS, EXPORT = "checkpoints", "export"
LOCK = ".lock"
HINTS = {
    **dict.fromkeys((".yaml", ".yml"), ": a config is given as -c {path}, and a run as --ckpt_path, such as runs/demo"),
    ".safetensors": ": fit starts from an adapter's directory with --model.init_adapter",
}
"""What to do with a file that torch has not written."""
HELD: set[Path] = set()
"""The run folders that this process has locked: closing a second handle of a file would release its lock."""


def run_dir(trainer: Trainer) -> Path | None:
    """Where this run writes; None where it writes nothing (fast_dev_run, no logger)."""
    if trainer.fast_dev_run or not trainer.loggers:  # type: ignore[attr-defined]
        return None
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger | TensorBoardLogger):
            return Path(logger.log_dir)
    first = trainer.loggers[0]
    return Path(first.save_dir or trainer.default_root_dir) / str(first.name) / str(first.version)


def dir_to_write(trainer: Trainer) -> Path | None:
    """`run_dir` in the process that writes there; None in the others."""
    return run_dir(trainer) if trainer.is_global_zero else None


@contextmanager
def lock_run(folder: Path | None) -> Iterator[None]:
    """Within the block no other process, on this machine or one that shares the disk, trains in this run folder.

    The system's lock on the file `.lock` ends with the process, however that ends.
    """
    if folder is None or fcntl is None or folder in HELD:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    with file.open("a+", encoding="utf-8") as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            raise LoRAError(
                f"{holder} trains in '{folder}': wait until it has ended, or give this run another --name"
            ) from None
        except OSError:  # a file system without locks
            yield
            return
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        HELD.add(folder)
        try:
            yield
        finally:
            HELD.remove(folder)
            file.unlink(missing_ok=True)


def run_of_checkpoint(checkpoint: Path) -> Path:
    """The run folder that a checkpoint belongs to: the one above `checkpoints/`, else the file's own folder."""
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else checkpoint.parent


def test_dir(trainer: Trainer) -> Path | None:
    """Where a test's metrics go: to the checkpoint's run, on other data to this run's folder."""
    folder = run_dir(trainer)
    if trainer.ckpt_path is None or (folder is not None and folder.name.startswith("test_")):
        return folder
    return run_of_checkpoint(Path(str(trainer.ckpt_path)))


def is_run(folder: Path) -> bool:
    """Whether a fit wrote here; a config.yaml alone does not say so."""
    return (folder / CHECKPOINTS).is_dir() or (folder / REPORT).is_file()


def find_checkpoint(path: str | Path, which: str = "best") -> Path:
    """A checkpoint file, from its path, a run's path, or the folder with a run's versions.

    Args:
        path: `.../best.ckpt`, `runs/demo/version_3` or `runs/demo` (its newest version that has checkpoints).
        which: `best` or `last`, where the path leaves that open.
    """
    path = Path(path)
    if path.is_dir() and (path.suffix == ".ckpt" or (path / ".metadata").is_file()):
        raise LoRAError(
            f"'{path}' is a checkpoint in parts, and files are read here: go on from it, or export it, with the version"
            " of lora_lightning that wrote it"
        )
    if is_zipfile(path) or path.with_name(path.name + PREVIOUS).exists():
        return path
    if path.is_file():
        hint = " (it is no zip file, or lacks its end)" if path.stat().st_size else " (it is empty)"
        raise LoRAError(f"'{path}' is not a whole checkpoint{HINTS.get(path.suffix, hint).format(path=path)}")
    if not path.is_dir():
        near = similar_names(path) or did_you_mean(str(path), ("best", "last"))
        raise LoRAError(f"no checkpoint or run folder '{path}'{near}")
    for folder in [*(run / CHECKPOINTS for run in (path, *_newest_first(path))), path]:
        if files := _checkpoints(folder):
            return _pick(files, which)
    if (path / "adapter_config.json").is_file():
        raise LoRAError(f"'{path}' is an adapter's directory and no run: fit starts from it with --model.init_adapter")
    folders = [folder for folder in path.glob(f"*/*/{CHECKPOINTS}") if _checkpoints(folder)]
    folders.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    if runs := list(dict.fromkeys(f"'{folder.parent.parent}'" for folder in folders)):
        raise LoRAError(f"'{path}' holds {len(runs)} runs, the newest first {first_few(runs, 8)}: name one of them")
    raise LoRAError(f"no checkpoints under '{path}': run `lora-lightning fit` first, or name a .ckpt file")


def similar_names(path: Path) -> str:
    """Folders and files of about this name in the same place."""
    near = near_misses(path.name, [entry.name for entry in path.parent.glob("*")], 2)
    return suggestion(path.parent / name for name in near)


def newest_checkpoint(runs: Path) -> Path | None:
    """The `last` of a folder with a run's versions; None where there is none yet."""
    try:
        return find_checkpoint(runs, "last") if runs.is_dir() else None
    except LoRAError:
        return None


def is_newest_state(checkpoint: Path) -> bool:
    """Whether a checkpoint is the newest of its run, so that a fit from it is the same run going on."""
    return find_checkpoint(run_of_checkpoint(checkpoint), "last").resolve() == checkpoint.resolve()


def continued_version(checkpoint: Path, runs: Path) -> int | None:
    """The version of `runs` whose newest state this checkpoint is, so that a fit goes on there; else None."""
    folder = run_of_checkpoint(checkpoint)
    version = _number(folder)
    is_of_runs = version >= 0 and folder.resolve() == (runs / f"version_{version}").resolve()
    return version if is_of_runs and is_newest_state(checkpoint) else None


def _newest_first(path: Path) -> list[Path]:
    versions = [p for p in path.iterdir() if (p / CHECKPOINTS).is_dir()]
    return sorted(versions, key=lambda p: (_number(p), p.stat().st_mtime), reverse=True)


def _number(version: Path) -> int:
    digits = version.name.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1


def _checkpoints(folder: Path) -> list[Path]:
    """A folder's checkpoints, oldest first, also those of which only the `.previous` file exists."""
    times = {file.with_suffix(""): file.stat().st_mtime for file in folder.glob(f"*.ckpt{PREVIOUS}")}
    times |= {file: file.stat().st_mtime for file in folder.glob("*.ckpt")}
    return sorted(times, key=lambda file: times[file])


def _pick(files: list[Path], which: str) -> Path:
    """`files` are of one folder, oldest first."""
    newest = files[-1]
    if (folder := newest.parent) / f"{which}.ckpt" in files:
        return folder / f"{which}.ckpt"
    if which == "last":
        return newest
    # A checkpoint carries the state of ModelCheckpoint, which says which file was best.
    states = load_checkpoint(newest).get("callbacks", {}).items()
    paths = [state.get("best_model_path") for key, state in states if key.startswith("ModelCheckpoint")]
    best = (folder / Path(path).name for path in paths if path)
    return next((file for file in best if file.exists()), newest)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's tensors and plain data, on the CPU; of a damaged one the file before it, with a warning."""
    try:
        content = read_checkpoint(Path(path))
    except FileNotFoundError as error:
        raise LoRAError(f"no checkpoint '{path}'") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise LoRAError(f"'{path}' is not a Lightning checkpoint: it has no state_dict")
    return content


def read_report(file: Path) -> dict[str, Any]:
    """A report's content; a file that cannot be read is renamed, for an error would end a finished fit."""
    if not file.is_file():
        return {}
    with suppress(ValueError):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    aside = file.with_name(f"{file.name}.damaged")
    file.replace(aside)
    rank_zero_warn(f"'{file}' is no JSON object and is now '{aside.name}'; the report begins anew")
    return {}


def update_report(run: Path, values: dict[str, Any], forget: Callable[[str], bool] | None = None) -> dict[str, Any]:
    """Add to the run's `report.json`, and copy it to the folder above, where the newest run's report stands.

    Entries whose names `forget` accepts are dropped before. Returns the whole report.
    """
    file = run / REPORT
    report = {key: value for key, value in read_report(file).items() if forget is None or not forget(key)} | values
    text = (json.dumps(report, indent=2) + "\n").encode()
    write_bytes(file, text)
    if run.name.startswith("version_") and [newest.name for newest in _newest_first(run.parent)[:1]] == [run.name]:
        write_bytes(run.parent / REPORT, text)
    return report
