"""The only reader and the only writer of tensor files.

A safetensors file is the length of its header (8 bytes, little-endian), the header in JSON (each tensor's dtype, shape
and place, and `__metadata__`), blanks up to a multiple of 8, and the tensors' bytes. The same content gives the same
bytes here: tensors are in safetensors' order, wide dtypes first, and metadata are sorted. Tensors are read into memory
and not mapped, so that no more than the tensors in use takes memory.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_lightning.lora.errors import AdapterError, first_line
from lora_lightning.lora.formats.atomic_dir import write_bytes

# safetensors' names of torch's dtypes; tensors of other dtypes are copied as bytes.
DTYPES: dict[str, torch.dtype] = {
    "C64": torch.complex64,
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor's entry in a file's header."""

    dtype: str
    """safetensors' name of the dtype."""
    shape: tuple[int, ...]
    size: int
    """Bytes."""
    file: str = ""
    """The name of the file that holds it."""
    start: int = 0
    """The place of its first byte in the file."""

    @property
    def width(self) -> int:
        """Bytes of one element; 1 where torch does not have the dtype."""
        return DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """A safetensors file's entries, in the order of the bytes, and its metadata; an AdapterError for a torn file."""
    if not path.is_file():
        raise AdapterError(f"no file {path}: export or download it again")
    try:
        with safe_open(path, framework="pt"):  # which checks all of the header against the file's size
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is not a whole safetensors file ({error}): export or download it again") from error
    metadata = header.pop("__metadata__", None) or {}
    content = {}
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (first, last), shape = entry["data_offsets"], tuple(entry["shape"])
        start = 8 + length + first
        content[key] = Stored(dtype=entry["dtype"], shape=shape, size=last - first, file=path.name, start=start)
    return content, metadata


def read_bytes(path: Path, key: str, start: int, size: int) -> Tensor:
    """`size` bytes of the tensor `key` from the file's byte `start` on, (size,); an AdapterError if it is too short."""
    buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
    view, done = memoryview(buffer.numpy()), 0  # type: ignore[arg-type]
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while done < size and (count := file.readinto(view[done:])):  # type: ignore[arg-type]
            done += count
    if done < size:
        raise AdapterError(f"{path} ends in the middle of '{key}': export or download it again")
    return buffer


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file by name, and its metadata; an AdapterError where torch has no such dtype."""
    header, metadata = read_header(path)
    if strange := next((key for key, at in header.items() if at.dtype not in DTYPES), None):
        raise AdapterError(f"{path} holds '{strange}' as {header[strange].dtype}, a dtype that torch cannot read")
    first = min((at.start for at in header.values()), default=0)
    # In one piece of memory, which is returned to the system: many small pieces would stay with the process.
    data = read_bytes(path, next(iter(header), ""), first, sum(at.size for at in header.values()))
    tensors = {}
    for key, at in header.items():
        piece = data[at.start - first : at.start - first + at.size]
        piece = piece if piece.storage_offset() % at.width == 0 else piece.clone()
        tensors[key] = piece.view(DTYPES[at.dtype]).reshape(at.shape)
    return tensors, metadata


def file_header(entries: Mapping[str, Stored], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file before its first tensor; the tensors follow in the order of `entries`."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for key, entry in entries.items():
        start, end = end, end + entry.size
        header[key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def sort_entries(entries: Mapping[str, Stored]) -> dict[str, Stored]:
    """Entries with wide dtypes first, so that every tensor is aligned to its width; else in the same order."""
    return dict(sorted(entries.items(), key=lambda item: -item[1].width))


def entries_of(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """The entries of a file with these tensors, which may be on the meta device; sorted by width, then by name."""
    return sort_entries(
        {key: Stored(dtype=NAMES[t.dtype], shape=tuple(t.shape), size=t.nbytes) for key, t in sorted(tensors.items())}
    )


def file_size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """The size in bytes of the file that `write_tensors` writes."""
    entries = entries_of(tensors)
    return len(file_header(entries, metadata)) + sum(entry.size for entry in entries.values())


def file_content(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, piece by piece: no second copy of a tensor on the CPU is made."""
    entries = entries_of(tensors)
    yield file_header(entries, metadata)
    for key in entries:
        yield memoryview(as_bytes(tensors[key]).numpy())  # type: ignore[arg-type]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; a reader sees the old file or the whole new one."""
    write_bytes(path, file_content(tensors, metadata))


def write_file(
    path: Path,
    entries: Mapping[str, Stored],
    metadata: Mapping[str, str],
    tensors: Iterable[tuple[str, Tensor]],
    progress: Callable[[int], None],
) -> None:
    """Write a safetensors file and sync it to disk; `tensors` are bytes by key in the order of `entries`, one at a
    time.
    """
    with path.open("wb") as file:
        file.write(file_header(entries, metadata))
        wanted = list(entries)
        for key, data in tensors:
            assert key == wanted.pop(0), key
            assert data.numel() == entries[key].size, key
            file.write(data.numpy().data)
            progress(entries[key].size)
            del data  # before the next one is computed
        assert not wanted, wanted
        file.flush()
        os.fsync(file.fileno())


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's values, (bytes,), on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def read_pickled(path: Path, *, wrappers: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The state dict of a file that `torch.save` wrote, zip or legacy. Only tensors and plain data are unpickled.

    Args:
        wrappers: keys under which training scripts store a state dict.

    Raises:
        AdapterError: the file is missing or torn, or holds anything but a state dict.
    """
    if not path.is_file():
        raise AdapterError(f"no file {path}")
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn pickle fails in as many ways as there are opcodes
        raise AdapterError(
            f"{path} is torn or holds more than tensors, and nothing else in it is opened ({first_line(error)}):"
            f" download it again, or save its state dict alone, best as safetensors"
        ) from error
    if isinstance(content, Mapping):
        content = next((content[key] for key in wrappers if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise AdapterError(f"{path} must hold a state dict, tensors by name, got a {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise AdapterError(
                f"{path} must hold a state dict of plain tensors, got a {type(value).__name__} under '{key}'"
            )
        if value.untyped_storage().nbytes() < value.numel() * value.itemsize:
            raise AdapterError(
                f"{path} has a tensor of shape {tuple(value.shape)} under '{key}' and few numbers for it"
            )
    return {key: value.detach() for key, value in content.items()}


def _check_sums(path: Path) -> None:
    """Compare a zip's checksums, which torch writes but does not check; raise a ValueError where one differs."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"'{damaged}' fails its checksum")
