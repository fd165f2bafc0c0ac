"""Images of a table as examples: opened, converted to RGB and augmented by (seed, epoch, row) on access."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from lora_lightning.data.loading.sampler import EpochSampler
from lora_lightning.lora.errors import LoRAError, MissingPackageError

try:  # other modules of images import this one first
    from PIL import Image, ImageOps
    from torchvision import tv_tensors
    from torchvision.transforms import v2
except ImportError as error:
    raise MissingPackageError("images need torchvision and pillow: pip install 'lora_lightning[vision]'") from error

PIXELS = "pixel_values"
Mask = tv_tensors.Mask
"""torchvision's label of each pixel, which is resized without mixing values."""


def open_image(source: np.ndarray[Any, Any] | bytes | str) -> Image.Image:
    """Open an array, a file's content, or a path or URL; of a file the header alone is read."""
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source))
    if "://" in source:  # inside an archive or on a server
        image: Image.Image = datasets.Image().decode_example({"path": source, "bytes": None})
        return image
    if not Path(source).is_file():
        raise FileNotFoundError("there is no such file")
    if not Path(source).stat().st_size:
        raise OSError("the file is empty")
    return Image.open(source)


def read_rgb(source: np.ndarray[Any, Any] | bytes | str) -> Image.Image:
    """Three channels of 8 bits, rotated as EXIF says. Transparency is dropped, 16 bits are scaled to 8."""
    with open_image(source) as opened:
        image = ImageOps.exif_transpose(opened)
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


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    """An array (h, w), (h, w, 1), (h, w, 3) or (h, w, 4) of uint8, or (h, w) of uint16."""
    array = array[:, :, 0] if array.shape[2:] == (1,) else array
    depths = (np.uint8, np.uint16) if array.ndim == 2 else (np.uint8,) if array.shape[2:] in ((3,), (4,)) else ()
    if array.dtype not in depths or not array.size:
        raise ValueError(
            f"expected an array (h, w), (h, w, 3) or (h, w, 4) of uint8, or (h, w) of uint16, got {array.shape} of"
            f" {array.dtype}"
        )
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
    """One column of images of a split, and the images' names in errors."""

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

    def source(self, i: int) -> np.ndarray[Any, Any] | bytes | str:
        """One image as `open_image` takes it."""
        cell = self.table[i][self.column]
        if isinstance(cell, int):
            return np.asarray(self.arrays[cell])
        path, content = self._path(cell), cell["bytes"] if isinstance(cell, dict) else None
        if content is not None:
            return bytes(content)
        if not path:
            raise ValueError("there is none")
        return path if "://" in path else str(self.root / path)

    def read(self, i: int, how: Callable[[Any], Any] = read_rgb, what: str = "an image") -> Any:
        """One image through `open_image`, `read_rgb` or the like; a BadImageError where it does not open."""
        try:
            return how(self.source(i))
        except Exception as error:  # each decoder has its errors
            got = " ".join(str(error).split()) or type(error).__name__
            got = "it is no image, or of a kind that is not known" if "cannot identify" in got else got
            raise self.fault(i, f"{what} that opens", got) from error

    def fault(self, i: int, expected: str, got: str) -> BadImageError:
        """The error for one image, with its file, row and column."""
        name = self._path(self.table[i][self.column]) or f"number {self.rows[i]}"
        if self.place is None:
            return BadImageError(f"{name}: expected {expected}, got {got}")
        where = f"{self.place}, row {self.rows[i]}, column '{self.column}'"
        return BadImageError(f"{where}: expected {expected}, got '{name}': {got}")

    @staticmethod
    def _path(cell: Any) -> str:
        path = cell["path"] if isinstance(cell, dict) else cell
        return path if isinstance(path, str) else ""

    def digest(self, i: int) -> bytes:
        """A hash of one image's stored content."""
        source = self.source(i)
        if isinstance(source, np.ndarray):
            source = f"{source.shape} {source.dtype.str}".encode() + source.tobytes()
        elif isinstance(source, str):
            source = Path(source).read_bytes() if Path(source).is_file() else source.encode()
        return hashlib.sha256(source).digest()


class Rows(Dataset[dict[str, Any]]):
    """Examples of one split: `pixel_values` (3, h, w) float32, or a PIL image without a transform, and `others`.

    A key is a row's index; with the epoch in front, (epoch, index), the example is augmented.

    Args:
        evaluation: the transform of examples without an epoch in their key.
        training: the transform of the others, drawn from (seed, epoch, row) in any process and order.
        others: further entries of the examples by name, such as `labels`.
    """

    column_names: Sequence[str] = ()

    def __init__(
        self,
        images: Cells,
        *,
        evaluation: Callable[[Any], Any] = v2.Identity(),  # noqa: B008  (without state)
        training: Callable[[Any], Any] = v2.Identity(),  # noqa: B008
        seed: int = 0,
        **others: Sequence[Any],
    ) -> None:
        self.images, self.others, self.labels = images, others, others.get("labels")
        self.evaluation, self.training, self.seed = evaluation, training, seed

    def __len__(self) -> int:
        return len(self.images.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, i = key if isinstance(key, tuple) else (None, key)
        example = self.read(i) | {name: values[i] for name, values in self.others.items()}
        if epoch is None:
            return dict(self.evaluation(example))
        with torch.random.fork_rng(devices=[]):
            seed = hash((self.seed, epoch, self.images.rows[i])) & 0x7FFF_FFFF_FFFF_FFFF
            torch.default_generator.manual_seed(seed)
            return dict(self.training(example))

    def read(self, i: int) -> dict[str, Any]:
        """An example's images by name, which are transformed together."""
        return {PIXELS: self.images.read(i)}
