"""Rows of images as examples, decoded on access to RGB and augmented by (seed, epoch, row)."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lora_lightning.data.loading.sampler import EpochSampler
from lora_lightning.lora.errors import LoRAError, MissingPackageError

try:  # other modules of images import this one first
    from PIL import Image, ImageOps
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional as TF
except ImportError as error:
    raise MissingPackageError("images need torchvision and pillow: pip install 'lora_lightning[vision]'") from error

PIXELS = "pixel_values"

Key = int | tuple[int, int]
"""A row's index in its split; with the epoch in front where it is augmented."""


SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Suffixes of image files, as in torchvision's ImageFolder. Other files are skipped."""


def open_image(source: Any) -> Image.Image:
    """Open an image and read only its header; OSError and ValueError where it is none.

    Args:
        source: a path; `{"bytes": ..., "path": ...}` as `datasets` stores images; an array (h, w), (h, w, 1), (h, w, 3)
            or (h, w, 4) of uint8, or (h, w) of uint16.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Mapping):
        data, path = source.get("bytes"), source.get("path")
        if data is not None:
            return Image.open(io.BytesIO(data))
        if path is not None and "://" in path:  # inside an archive or on a server: datasets can read it
            image: Image.Image = datasets.Image().decode_example({"path": path, "bytes": None})
            return image
        source = path
    if not isinstance(source, str):
        raise ValueError(f"expected a path, got {type(source).__name__}")
    file = Path(source)
    if not file.is_file():
        raise FileNotFoundError("there is no such file")
    if not file.stat().st_size:
        raise OSError("the file is empty")
    return Image.open(file)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to three channels of 8 bits, rotated as EXIF says. Transparency is dropped, 16 bits are scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ValueError(f"32-bit values from {values.min()} to {values.max()}: save it with 8 or 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("32-bit floats, whose range is not known: save it with 8 or 16 bits")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def read_rgb(source: Any) -> Image.Image:
    """Open an image and convert it to RGB."""
    with open_image(source) as image:
        return to_rgb(image)


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    has_colors = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
    if not has_colors and not (array.ndim == 2 and array.dtype in (np.uint8, np.uint16)):
        raise ValueError(
            f"expected an array (h, w), (h, w, 3) or (h, w, 4) of uint8, or (h, w) of uint16, got {array.shape} of"
            f" {array.dtype}"
        )
    if not array.size:
        raise ValueError(f"the array is empty: {array.shape}")
    return Image.fromarray(np.ascontiguousarray(array))


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
        """Decode one image, or raise a BadImageError."""
        return self._opened(i, read_rgb)

    def verify(self, i: int) -> None:
        """Open an image and discard it, or raise a BadImageError."""
        self._opened(i, open_image).close()

    def _opened(self, i: int, read: Callable[[Any], Image.Image]) -> Image.Image:
        try:
            return read(self.source(i))
        except Exception as error:  # each decoder has its errors
            raise self.fault(i, "an image that opens", reason_of(error)) from error

    def digest(self, i: int) -> bytes:
        """A hash of one image's stored content."""
        source = self.source(i)
        if isinstance(source, np.ndarray):
            data = repr((source.shape, source.dtype.str)).encode() + source.tobytes()
        elif isinstance(source, Mapping) and source.get("bytes") is not None:
            data = source["bytes"]
        elif isinstance(source, str) and Path(source).is_file():
            data = Path(source).read_bytes()
        else:
            data = repr(source).encode()
        return hashlib.sha256(data).digest()


def reason_of(error: Exception) -> str:
    """Return an error's message without the address of a buffer."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "it is no image, or of a kind that is not known" if "cannot identify" in text else text


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
        example = {name: value.as_subclass(Tensor) for name, value in self.transform(key, self.read(i)).items()}
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
