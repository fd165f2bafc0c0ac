"""The only reader and the only writer of tensor files.

A safetensors file is the length of its header (8 bytes, little-endian), the header in JSON (each tensor's dtype, shape
and place, and `__metadata__`), blanks up to a multiple of 8, and the tensors' bytes. The same content gives the same
bytes here: tensors are in safetensors' order, wide dtypes first, and metadata are sorted. Tensors are read into memory
and not mapped, so that no more than the tensors in use takes memory.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_lightning.lora.errors import AdapterError, LoRAError, did_you_mean, first_few, first_line
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

BLOCK = 2**24
"""Bytes that are read at once where a tensor is read in blocks."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor in a file, by its entry in the header."""

    key: str
    dtype: str
    """safetensors' name of the dtype."""
    shape: tuple[int, ...]
    size: int
    """Bytes."""
    path: Path = Path()
    """The file that holds it."""
    start: int = 0
    """The place of its first byte in the file."""

    @classmethod
    def of(cls, key: str, dtype: torch.dtype, shape: Sequence[int]) -> Stored:
        """The entry of a tensor that will be written."""
        return cls(key=key, dtype=NAMES[dtype], shape=tuple(shape), size=math.prod(shape) * dtype.itemsize)

    @property
    def width(self) -> int:
        """Bytes of one element; 1 where torch does not have the dtype."""
        return DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1

    def read_bytes(self, start: int = 0, size: int | None = None) -> Tensor:
        """`size` bytes from the offset `start` on, else all the rest; an AdapterError if the file is too short."""
        size = self.size - start if size is None else size
        buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        view, done = memoryview(buffer.numpy()), 0  # type: ignore[arg-type]
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start + start)
            while done < size and (count := file.readinto(view[done:])):  # type: ignore[arg-type]
                done += count
        if done < size:
            raise AdapterError(f"{self.path} ends in the middle of '{self.key}': export or download it again")
        return buffer

    def read(self) -> Tensor:
        """The whole tensor; a LoRAError where torch cannot compute with its dtype."""
        return self._shape(self.read_bytes(), *self.shape)

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Rows of a tensor that has at least one dimension, in blocks of about `BLOCK` bytes, (rows, ...)."""
        row, stop = self.size // max(1, self.shape[0]), self.shape[0] if stop is None else stop
        for first in range(start, stop, step := max(1, BLOCK // max(1, row))):
            rows = min(step, stop - first)
            yield self._shape(self.read_bytes(first * row, rows * row), rows, *self.shape[1:])

    def _shape(self, data: Tensor, *shape: int) -> Tensor:
        if self.dtype not in DTYPES:
            raise LoRAError(f"'{self.key}' is stored as {self.dtype}, which is quantized: name the unquantized base")
        return data.view(DTYPES[self.dtype]).reshape(shape)


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
        (first, last), start = entry["data_offsets"], 8 + length
        place = {"path": path, "start": start + first, "size": last - first}
        content[key] = Stored(key=key, dtype=entry["dtype"], shape=tuple(entry["shape"]), **place)
    return content, metadata


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file by name, and its metadata; an AdapterError where torch has no such dtype."""
    header, metadata = read_header(path)
    if strange := next((key for key, at in header.items() if at.dtype not in DTYPES), None):
        raise AdapterError(f"{path} holds '{strange}' as {header[strange].dtype}, a dtype that torch cannot read")
    if not header:
        return {}, metadata
    first = next(iter(header.values()))
    # In one piece of memory, which is returned to the system: many small pieces would stay with the process.
    data = first.read_bytes(size=sum(at.size for at in header.values()))
    tensors = {}
    for key, at in header.items():
        piece = data[at.start - first.start : at.start - first.start + at.size]
        piece = piece if piece.storage_offset() % at.width == 0 else piece.clone()
        tensors[key] = piece.view(DTYPES[at.dtype]).reshape(at.shape)
    return tensors, metadata


def sort_entries(entries: Iterable[Stored]) -> dict[str, Stored]:
    """Entries by key with wide dtypes first, so that every tensor is aligned to its width; else in the same order."""
    return {entry.key: entry for entry in sorted(entries, key=lambda entry: -entry.width)}


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


def file_pieces(
    entries: Mapping[str, Stored], metadata: Mapping[str, str], bytes_of: Callable[[str], Tensor]
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, piece by piece; `bytes_of` returns a tensor's, (bytes,), one at a time."""
    yield file_header(entries, metadata)
    yield from (memoryview(bytes_of(key).numpy()) for key in entries)  # type: ignore[arg-type]


def entries_of(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """The entries of a file with these tensors, which may be on the meta device; sorted by width, then by name."""
    return sort_entries(Stored.of(key, tensor.dtype, tensor.shape) for key, tensor in sorted(tensors.items()))


def file_size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """The size in bytes of the file that `write_tensors` writes."""
    return len(file_header(entries_of(tensors), metadata)) + sum(tensor.nbytes for tensor in tensors.values())


def file_content(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a file with these tensors: no second copy of a tensor on the CPU is made."""
    return file_pieces(entries_of(tensors), metadata, lambda key: as_bytes(tensors[key]))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; a reader sees the old file or the whole new one."""
    write_bytes(path, file_content(tensors, metadata))


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
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch writes checksums and does not compare them
                    raise ValueError(f"'{damaged}' fails its checksum")
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


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a directory: `model.safetensors`, or `model.safetensors.index.json` and its shards, or `names`.

    A LoRAError where a file is missing or torn, the index names tensors that no shard has, or two shards have one name.
    """

    def __init__(self, directory: Path, names: Sequence[str] = ()) -> None:
        self.directory = directory
        self.index: dict[str, dict[str, str]] | None = None
        self.files: dict[str, list[str]] = {}
        """The keys of each file, in the file's order."""
        self.stored: dict[str, Stored] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        if not names and not (directory / SINGLE).is_file():  # what transformers looks for first
            self.index = _read_index(directory)
        places = self.index["weight_map"] if self.index else {}
        for name in names or sorted(set(places.values())) or [SINGLE]:
            pieces, self.metadata[name] = read_header(directory / name)
            if twice := next((key for key in pieces if key in self.stored), None):
                # transformers takes the last one, but the index names one file
                named = f"; {INDEX} names {places.get(twice, 'neither')}" if self.index else ""
                both = f"{self.stored[twice].path.name} and {name}"
                raise LoRAError(f"'{twice}' is in two files of {directory}, {both}{named}: download it again")
            self.files[name] = list(pieces)
            self.stored |= pieces
        if lost := sorted(places.keys() - self.stored.keys()):
            raise LoRAError(
                f"{directory / INDEX} names tensors that no file holds ({first_few(lost)}): download it again"
            )


def _read_index(directory: Path) -> dict[str, dict[str, str]]:
    path = directory / INDEX
    if not directory.is_dir():
        near = did_you_mean(directory.name, [folder.name for folder in directory.parent.glob("*/")])
        hub = ": a model of the hub has to be downloaded first (hf download NAME)"
        raise LoRAError(f"no folder '{directory}'{near or hub}")
    if not path.is_file():
        raise LoRAError(f"'{directory}' holds neither {SINGLE} nor {INDEX}: name such a directory (save_pretrained)")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = index["weight_map"].values()
        if not all(name == Path(name).name and name.endswith(".safetensors") for name in names):
            raise ValueError("weight_map must name safetensors files beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoRAError(f"{path} cannot be read ({error}): download it again") from error
    return index  # type: ignore[no-any-return]
