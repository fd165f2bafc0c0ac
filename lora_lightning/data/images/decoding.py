"""Decodes a file, bytes or an array to an RGB image, whatever the file's colors, depth and orientation."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_lightning.lora.errors import MissingPackageError

try:  # other modules of images import this one first
    import torchvision  # noqa: F401
    from PIL import Image, ImageOps
except ImportError as error:
    raise MissingPackageError("images need torchvision and pillow: pip install 'lora_lightning[vision]'") from error

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Suffixes of image files, as in torchvision's ImageFolder. Other files are skipped."""


def open_image(source: Any) -> Image.Image:
    """Open an image and read only its header.

    Args:
        source: a path; `{"bytes": ..., "path": ...}` as `datasets` stores images; an array (h, w), (h, w, 1), (h, w, 3)
            or (h, w, 4) of uint8, or (h, w) of uint16.

    Raises:
        OSError, ValueError: it is no image.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Mapping):
        data, path = source.get("bytes"), source.get("path")
        if data is not None:
            return Image.open(io.BytesIO(data))
        if path is not None and "://" in path:  # inside an archive or on a server: datasets can read it
            import datasets

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
    """Convert to three channels of 8 bits, rotated as EXIF says. Transparency is dropped, 16 bits are scaled to 8.

    Raises:
        OSError, ValueError: the content cannot be decoded, or its range is unknown.
    """
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
