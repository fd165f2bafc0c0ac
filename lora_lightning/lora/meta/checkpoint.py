"""A model's safetensors files on disk, in the hub's layout, read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_lightning.lora.errors import LoRAError, did_you_mean, first_few
from lora_lightning.lora.formats.tensor_files import DTYPES, Stored, read_bytes, read_header

BLOCK = 2**24
"""Bytes that are read at once where a tensor is read in blocks."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a directory: `model.safetensors`, or `model.safetensors.index.json` and its shards, or `names`.

    A LoRAError where a file is missing or torn, the index names tensors that no shard has, or two shards have one name.
    """

    def __init__(self, directory: Path, names: Sequence[str] = ()) -> None:
        self.directory = directory
        self.index = None if names else _read_index(directory)
        self.files: dict[str, list[str]] = {}
        """The keys of each file, in the file's order."""
        self.stored: dict[str, Stored] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        if self.index is not None:
            names = sorted(set(self.index["weight_map"].values()))
        for name in names or [SINGLE]:
            pieces, self.metadata[name] = read_header(directory / name)
            if twice := next((key for key in pieces if key in self.stored), None):
                # transformers takes the last one, but the index names one file
                named = f"; {INDEX} names {self.index['weight_map'].get(twice, 'neither')}" if self.index else ""
                raise LoRAError(
                    f"'{twice}' is in two files of {directory}, {self.stored[twice].file} and {name}{named}: download"
                    f" it again, or load the model and save it anew"
                )
            self.files[name] = list(pieces)
            self.stored |= pieces
        lost = sorted(set(self.index["weight_map"]) - self.stored.keys()) if self.index else []
        if lost:
            raise LoRAError(
                f"{directory / INDEX} names tensors that no file holds ({first_few(lost)}): download it again"
            )

    def read_bytes(self, key: str, start: int = 0, size: int | None = None) -> Tensor:
        """The tensor's bytes, (bytes,), or `size` of them from the offset `start` on."""
        at = self.stored[key]
        size = at.size - start if size is None else size
        return read_bytes(self.directory / at.file, key, at.start + start, size)

    def read(self, key: str) -> Tensor:
        """The whole tensor; a LoRAError where torch cannot compute with its dtype."""
        return self.read_bytes(key).view(self.dtype_of(key)).reshape(self.stored[key].shape)

    def blocks(self, key: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Rows of a tensor that has at least one dimension, in blocks of about `BLOCK` bytes, (rows, ...)."""
        at, dtype = self.stored[key], self.dtype_of(key)
        row = at.size // max(1, at.shape[0])
        stop, step = at.shape[0] if stop is None else stop, max(1, BLOCK // max(1, row))
        for first in range(start, stop, step):
            rows = min(step, stop - first)
            yield self.read_bytes(key, first * row, rows * row).view(dtype).reshape(rows, *at.shape[1:])

    def dtype_of(self, key: str) -> torch.dtype:
        """torch's dtype of a tensor; a LoRAError where torch cannot compute with it."""
        name = self.stored[key].dtype
        if name not in DTYPES:
            raise LoRAError(f"'{key}' is stored as {name}, which is quantized: name the unquantized base")
        return DTYPES[name]


def _read_index(directory: Path) -> dict[str, dict[str, str]] | None:
    path = directory / INDEX
    if (directory / SINGLE).is_file():  # what transformers looks for first
        return None
    if not directory.is_dir():
        beside = [path.name for path in Path(directory).parent.glob("*") if path.is_dir()]
        near = did_you_mean(Path(directory).name, beside)
        hub = ": a model of the hub has to be downloaded first (hf download NAME)"
        raise LoRAError(f"no folder '{directory}'{near or hub}")
    if not path.is_file():
        raise LoRAError(
            f"'{directory}' holds neither {SINGLE} nor {INDEX}: name a model's directory in that layout; an older one"
            f" takes it by from_pretrained and save_pretrained"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = index["weight_map"].values()
        if not all(name == Path(name).name and name.endswith(".safetensors") for name in names):
            raise ValueError("weight_map must name safetensors files beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoRAError(f"{path} cannot be read ({error}): download it again") from error
    return index  # type: ignore[no-any-return]
