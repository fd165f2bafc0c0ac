"""Checkpoints as folders to which each process adds its part, whole or absent, in torch.distributed.checkpoint's form.

A folder holds what that package writes (`.metadata` and `*.distcp`: the sharded tensors), `rest.pt` (all else, as plain
data) and `manifest.json`, which names every file with its size and SHA-256. It is written aside, synced and moved; the
one before it stays as `NAME.previous` and is read where the newer one is damaged. It can be read by any number of
processes, and by one without a process group.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.checkpoints.checkpoint_index import Reader
from lora_lightning.training.checkpoints.damage import DamagedCheckpointError
from lora_lightning.training.distributed import gathered, processes, rank, together

MANIFEST, REST, STATE, OPTIMIZER = "manifest.json", "rest.pt", "state_dict", "optimizer"
PREVIOUS = ".previous"
PIECE = 1 << 20
FORMAT = 1


def is_folder_checkpoint(path: Path) -> bool:
    """Whether it is one, whole or not."""
    return path.is_dir() and (path.suffix == ".ckpt" or path.name.endswith(PREVIOUS) or (path / MANIFEST).is_file())


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Write all of it or nothing; every process calls it.

    Raises:
        LoRAError: in all processes, where one could not write. What stood there stands there still.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        together(lambda: _begin(aside) if rank() == 0 else None)
        parts, rest = _split(checkpoint)
        writer = FileSystemWriter(aside, sync_files=True)
        with _alone_is_meant():
            state_dict_saver.save(parts, storage_writer=writer, no_dist=processes() == 1)
        own = together(lambda: {f.name: _entry(f) for f in aside.glob(f"__{rank()}_*")})
        every = {name: entry for part in gathered(own) for name, entry in part.items()}
        together(lambda: _finish(aside, path, rest, every) if rank() == 0 else None)
    except (Exception, CheckpointException) as error:  # torch's own is no Exception
        if rank() == 0:
            with suppress(OSError):
                remove(aside)
        raise LoRAError(unwritten(path, (str(error).strip() or type(error).__name__).splitlines()[-1])) from error


def unwritten(path: Path, reason: str) -> str:
    """What is said where a disk is full or a folder cannot be written."""
    return (
        f"the checkpoint '{path}' could not be written ({reason}): make room there or give another --runs_dir, and go"
        " on with --ckpt_path last; older checkpoints are as they were"
    )


def _begin(aside: Path) -> None:
    aside.parent.mkdir(parents=True, exist_ok=True)
    remove(aside)  # left by one that was killed while it wrote
    aside.mkdir()


def _split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is sharded, by key, and all else in its own place."""
    parts = {f"{STATE}/{k}": v for k, v in checkpoint[STATE].items() if isinstance(v, DTensor)}
    rest = {**checkpoint, STATE: {k: v for k, v in checkpoint[STATE].items() if not isinstance(v, DTensor)}}
    if "optimizer_states" not in checkpoint:  # weights only
        return parts, rest
    rest["optimizer_states"] = []
    for number, optimizer in enumerate(checkpoint["optimizer_states"]):
        states: dict[Any, dict[str, Any]] = {}
        for i, state in optimizer["state"].items():
            sharded = {name: v for name, v in state.items() if isinstance(v, DTensor)}
            parts |= {f"{OPTIMIZER}/{number}/{i}/{name}": v for name, v in sharded.items()}
            states[i] = {name: v for name, v in state.items() if name not in sharded}
        rest["optimizer_states"].append({**optimizer, "state": states})
    return parts, rest


def _finish(aside: Path, path: Path, rest: dict[str, Any], files: dict[str, Any]) -> None:
    with (aside / REST).open("wb") as file:
        torch.save(rest, file)
        file.flush()
        os.fsync(file.fileno())
    files |= {name: _entry(aside / name) for name in (".metadata", REST)}
    with (aside / MANIFEST).open("w", encoding="utf-8") as text:
        json.dump({"format": FORMAT, "files": dict(sorted(files.items()))}, text, indent=1)
        text.flush()
        os.fsync(text.fileno())
    sync(aside)
    if path.exists():
        move_aside(path)
    aside.rename(path)
    sync(path.parent)


def move_aside(path: Path) -> None:
    """Let what is about to be replaced be the one before."""
    before = path.with_name(path.name + PREVIOUS)
    remove(before)
    path.rename(before)


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Make moves within a folder last; not every system opens folders."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


@contextmanager
def _alone_is_meant() -> Iterator[None]:
    """torch warns that a process reads or writes without the others, which `no_dist` has just told it to do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        yield


def _entry(file: Path) -> dict[str, Any]:
    sha = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(PIECE):
            sha.update(piece)
    return {"bytes": file.stat().st_size, "sha256": sha.hexdigest()}


def check(path: Path) -> None:
    """Raise unless the folder is what was written.

    Raises:
        DamagedCheckpointError: with what is wrong.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise DamagedCheckpointError(f"'{path}' is of format {manifest['format']}, and {FORMAT} is read here")
        for name, entry in manifest["files"].items():
            if name != Path(name).name:
                raise DamagedCheckpointError(f"'{path}' is not a whole checkpoint: its manifest names '{name}'")
            if _entry(path / name) != entry:
                raise DamagedCheckpointError(f"'{path}' is not a whole checkpoint: '{name}' has changed")
        if not {REST, ".metadata"} <= manifest["files"].keys():
            raise DamagedCheckpointError(f"'{path}' is not a whole checkpoint: its manifest is not whole")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DamagedCheckpointError):
            raise
        raise DamagedCheckpointError(f"'{path}' is not a whole checkpoint ({error})") from error


# Reading.


def read(path: Path, *, weights_only: bool = True, map_location: Any = "cpu") -> dict[str, Any]:
    """All of it, in the form of a file, by one process."""
    content = read_rest(path, weights_only=weights_only, map_location=map_location)
    content[STATE] |= read_parts(path, STATE, {})
    for number, optimizer in enumerate(content.get("optimizer_states", [])):
        add_parts(path, number, optimizer["state"], {})
    return content


def read_rest(path: Path, *, weights_only: bool = True, map_location: Any = "cpu") -> dict[str, Any]:
    """All but the sharded tensors, in its own place."""
    content: dict[str, Any] = torch.load(path / REST, map_location=map_location, weights_only=weights_only)
    return content


def shapes(path: Path, prefix: str) -> dict[str, Tensor]:
    """The sharded tensors under a prefix, without their numbers."""
    start = f"{prefix}/"
    return {
        key.removeprefix(start): torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for key, entry in Reader(path).read_metadata().state_dict_metadata.items()
        if key.startswith(start) and isinstance(entry, TensorStorageMetadata)
    }


def read_parts(path: Path, prefix: str, like: Mapping[str, Any]) -> dict[str, Any]:
    """The sharded tensors under a prefix: in parts as `like` has them, by key, or whole on the CPU."""
    found: dict[str, Any] = {}
    for key, shape in shapes(path, prefix).items():
        own = like.get(key)
        if isinstance(own, DTensor) and own.shape == shape.shape:
            found[key] = torch.empty_like(own, dtype=shape.dtype)
        else:
            found[key] = torch.empty_like(shape, device="cpu")
    if found:
        parts = {f"{prefix}/{key}": value for key, value in found.items()}
        try:
            with _alone_is_meant():
                state_dict_loader.load(parts, storage_reader=Reader(path), no_dist=True)
        except CheckpointException as error:
            raise DamagedCheckpointError(f"'{path}' cannot be read ({str(error).splitlines()[-1]})") from error
    return found


def add_parts(path: Path, number: int, values: dict[Any, dict[str, Any]], held: Mapping[Any, Any]) -> None:
    """Put an optimizer's sharded tensors among its others, by number and name; `held` are its parameters."""
    prefix = f"{OPTIMIZER}/{number}"
    by_text = {str(i): i for i in values}
    known = {key: held.get(by_text.get(key.partition("/")[0])) for key in shapes(path, prefix)}
    for key, value in read_parts(path, prefix, known).items():
        i, _, name = key.partition("/")
        values[by_text[i]][name] = value
