"""Rows of images as examples, decoded on access and augmented by (seed, epoch, row)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from lora_lightning.data.images.decoding import open_image, read_rgb
from lora_lightning.data.loading.sampler import EpochSampler
from lora_lightning.lora.errors import LoRAError

PIXELS = "pixel_values"

Key = int | tuple[int, int]
"""A row's index in its split; with the epoch in front where it is augmented."""


class BadImageError(LoRAError):
    """An image that does not open, or does not fit its mask."""

    def __init__(self, message: str = "") -> None:
        # Torch makes the error of a worker process anew, with the traceback in front of the message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class AugmentedOrder(EpochSampler):
    """An `EpochSampler` that yields each row with the epoch, so that workers know it."""

    def __iter__(self) -> Iterator[Any]:
        return ((self.epoch, row) for row in super().__iter__())


@dataclass(frozen=True, kw_only=True)
class Cells:
    """One column of images of a table, and the images' names in errors."""

    table: datasets.Dataset
    column: str
    root: Path
    """The folder of relative paths."""
    arrays: Sequence[Any]
    """Images to which integers in the column refer."""
    rows: Sequence[int]
    """Each example's row in its file."""
    place: str | None
    """The file and split in errors; None where each example is a separate file."""

    def source(self, i: int) -> Any:
        """Return the example's image in a form that `open_image` takes."""
        cell = self.table[i][self.column]
        if isinstance(cell, int):
            return self.arrays[cell]
        if isinstance(cell, str):
            return str(self.root / cell)
        if isinstance(cell, Mapping) and cell.get("bytes") is None and cell.get("path") and "://" not in cell["path"]:
            return str(self.root / cell["path"])
        return cell

    def name(self, i: int) -> str:
        """The file of an example, else its row."""
        cell = self.table[i][self.column]
        path = cell.get("path") if isinstance(cell, Mapping) else cell
        return str(path) if path is not None and not isinstance(cell, int) else f"number {self.rows[i]}"

    def fault(self, i: int, expected: str, got: str) -> BadImageError:
        """The error for one image, with its file, row and column."""
        if self.place is None:
            return BadImageError(f"{self.name(i)}: expected {expected}, got {got}")
        where = f"{self.place}, row {self.rows[i]}, column '{self.column}'"
        return BadImageError(f"{where}: expected {expected}, got '{self.name(i)}': {got}")

    def rgb(self, i: int) -> Image.Image:
        """Decode one image.

        Raises:
            BadImageError: it cannot be decoded.
        """
        try:
            return read_rgb(self.source(i))
        except Exception as error:  # each decoder has its errors
            raise self.fault(i, "an image that opens", reason_of(error)) from error

    def verify(self, i: int, *, decode: bool) -> None:
        """Open an image, or decode it, and discard it."""
        if decode:
            self.rgb(i)
            return
        try:
            open_image(self.source(i)).close()
        except Exception as error:
            raise self.fault(i, "an image that opens", reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """Return an error's message without the address of a buffer."""
    text = " ".join(str(error).split())
    return (
        "it is no image, or of a kind that is not known" if "cannot identify" in text else text or type(error).__name__
    )


class Rows(Dataset[dict[str, Any]]):
    """Examples of one split: `pixel_values` (3, h, w) float32, and `labels` where there are any.

    Args:
        images: the column of images.
        evaluation: the transform of examples without an epoch in their key.
        training: the transform of examples with an epoch in their key.
        seed: of the augmentation.
        labels: the number of each row's label.
    """

    def __init__(
        self,
        images: Cells,
        *,
        evaluation: v2.Transform,
        training: v2.Transform,
        seed: int,
        labels: Sequence[int] | None = None,
    ) -> None:
        self.images, self.labels = images, labels
        self.evaluation, self.training, self.seed = evaluation, training, seed
        self.column_names: list[str] = []

    def __len__(self) -> int:
        return len(self.images.table)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        i = key if isinstance(key, int) else key[1]
        example = self.transform(key, self.read(i))
        return example if self.labels is None else {**example, "labels": self.labels[i]}

    def read(self, i: int) -> dict[str, Any]:
        """Return an example's images by name, which are transformed together."""
        return {PIXELS: as_tensor(self.images.rgb(i))}

    def transform(self, key: Key, read: dict[str, Any]) -> dict[str, Any]:
        """Transform an example: the same (seed, epoch, row) gives the same result in any process and order."""
        if isinstance(key, int):
            return dict(self.evaluation(read))
        epoch, i = key
        with torch.random.fork_rng(devices=[]):
            seed = hash((self.seed, epoch, self.images.rows[i])) & 0x7FFF_FFFF_FFFF_FFFF
            torch.default_generator.manual_seed(seed)
            return dict(self.training(read))


def as_tensor(image: Image.Image) -> tv_tensors.Image:
    """Return an image as (3, h, w) uint8."""
    return tv_tensors.Image(TF.pil_to_tensor(image))


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack examples into a batch by name."""
    batch: dict[str, Tensor] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        batch[name] = (
            torch.stack([v.as_subclass(Tensor) for v in values])
            if isinstance(values[0], Tensor)
            else torch.tensor(values)
        )
    return batch
