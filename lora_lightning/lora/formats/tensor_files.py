"""Files that are whole or absent, and the same bytes each time."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_lightning.lora.errors import AdapterError


def write_bytes(path: Path, data: bytes) -> None:
    """Write aside, sync, move into place: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_all({path: data})


def write_together(directory: Path, files: Mapping[str, bytes]) -> None:
    """Files that belong together: none is moved into place before all are written.

    Raises:
        AdapterError: they cannot be written. The directory is then as it was.
    """
    new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path in (directory / name for name in files):
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a directory")
        _write_all({directory / name: data for name, data in files.items()})
    except OSError as error:
        if new:
            with suppress(OSError):
                directory.rmdir()
        raise AdapterError(
            f"'{directory}' cannot be written ({error}): expected a directory, old or new, on a disk with"
            f" {sum(map(len, files.values()))} bytes to spare; what was there is as it was"
        ) from error


def _write_all(files: Mapping[Path, bytes]) -> None:
    asides = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    try:
        for path, aside in asides.items():
            with aside.open("wb") as file:
                file.write(files[path])
                file.flush()
                os.fsync(file.fileno())
        for path, aside in asides.items():
            aside.replace(path)
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensor_bytes`."""
    write_bytes(path, tensor_bytes(tensors, metadata))


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file, byte for byte the same for the same content.

    safetensors writes metadata in the random order of a hash map; the header is put in order here.
    """
    plain = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    data = safetensors.torch.save(plain, metadata=dict(metadata))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        AdapterError: the file is missing, torn or not safetensors.
    """
    if not path.is_file():
        raise AdapterError(f"no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is not a whole safetensors file ({error}): export or download it again") from error


def read_pickled(path: Path, *, wrappers: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Tensors of a file that `torch.save` wrote, zip or legacy. Nothing but tensors and plain data is unpickled.

    Args:
        wrappers: keys under which training scripts store a state dict; it is taken from there.

    Raises:
        AdapterError: the file is missing or torn, or holds anything but a state dict.
    """
    if not path.is_file():
        raise AdapterError(f"no file {path}")
    try:
        _check_sums(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn pickle fails in as many ways as there are opcodes
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise AdapterError(
            f"{path} is torn or holds more than tensors, and nothing else in it is opened ({reason}): download it"
            f" again, or save its state dict alone, best as safetensors"
        ) from error
    for key in wrappers:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise AdapterError(f"{path} must hold a state dict, tensors by name, got a {type(found).__name__}")
    for key, value in found.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise AdapterError(
                f"{path} must hold a state dict of plain tensors, got a {type(value).__name__} under '{key}'"
            )
        if value.untyped_storage().nbytes() < value.numel() * value.itemsize:
            raise AdapterError(
                f"{path} has a tensor of shape {tuple(value.shape)} under '{key}' and few numbers for it"
            )
    return {key: value.detach() for key, value in found.items()}


def _check_sums(path: Path) -> None:
    """torch reads a zip without comparing the checksums that it wrote."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"'{damaged}' fails its checksum")
