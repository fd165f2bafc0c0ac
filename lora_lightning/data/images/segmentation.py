"""Images with a label for each pixel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from lora_lightning.data.images.rows import (  # says what to install
    PIXELS,
    Cells,
    Rows,
    as_tensor,
    open_image,
    reason_of,
)

# isort: split
from torchvision import tv_tensors

from lora_lightning.backbones.locate import resolve
from lora_lightning.data.classification import LabelNames
from lora_lightning.data.images.table import ImageTable, folders_by_split, image_files, some_images
from lora_lightning.data.io.tables import files_read
from lora_lightning.lora.errors import LoRAError, first_few

ONE_CHANNEL = ("L", "P", "1", "I", "I;16", "I;16B", "I;16L")
"""Pillow's modes whose pixels are one number; of a palette it is the index, as masks use it."""


class SegmentationData(LabelNames, ImageTable):
    """Images and masks to batches of `pixel_values` (n, 3, h, w) and `labels` (n, h, w).

    A mask is an image of one channel whose values are numbers of labels, or `ignore_index`. Image and mask are resized,
    cropped and mirrored together, the mask without mixing values; in evaluation the whole image is squeezed into
    `image_size`.

    Args:
        path: a folder with `images` and `masks` of the same names, or with such folders under `train`, `val` and
            `test`; a table (CSV, TSV, JSONL, Parquet) with two columns of paths; files or folders by split; a saved
            `datasets` directory, or a set on the hub with two `Image` columns.
        image_column: the image.
        mask_column: its mask.
        image_folder: the folder of images in a folder.
        mask_folder: the folder of masks; an image's mask has the same name with any suffix.
        label_names: names in the order of their numbers.
        num_classes: the number of labels; by default that of the names. One of the two is needed.
        ignore_index: value of pixels without a label.
        reduce_labels: for sets where 0 means no label, such as ADE20K: 0 is ignored and 1 is the first label.
        batch_size: images per batch and process in training.
        images: arguments of `ImageTable` and `TableData` by name; the whole image is always shown.

    Raises:
        LoRAError: an image or a mask that is missing or does not open, a mask of another size than its image, a value
            that is no label, with the file.
    """

    def __init__(
        self,
        path: str | dict[str, str],
        image_column: str = "image",
        mask_column: str = "mask",
        image_folder: str = "images",
        mask_folder: str = "masks",
        label_names: list[str] | None = None,
        num_classes: int | None = None,
        ignore_index: int = 255,
        reduce_labels: bool = False,
        batch_size: int = 8,
        **images: Any,
    ) -> None:
        super().__init__(path, batch_size=batch_size, crop_share=1, **images)
        if not label_names and num_classes is None:
            raise LoRAError("SegmentationData needs label_names, or num_classes: they are not read off the masks")
        if label_names and num_classes not in (None, len(label_names)):
            raise LoRAError(f"num_classes is {num_classes} and label_names has {len(label_names)}: leave out one")
        if self.augment.rand_augment is not None:
            raise LoRAError("augment.rand_augment is for images alone: it would not move the masks with them")
        self.given_label_names = list(label_names or (str(i) for i in range(num_classes or 0)))
        if 0 <= ignore_index < len(self.given_label_names):
            raise LoRAError(f"ignore_index {ignore_index} is one of the labels")
        self.image_column, self.mask_column = image_column, mask_column
        self.folders = (image_folder, mask_folder)
        self.ignore_index, self.reduce_labels = ignore_index, reduce_labels

    @property
    def image_columns(self) -> Sequence[str]:
        return [self.image_column, self.mask_column]

    def read_images(self) -> dict[str, datasets.Dataset]:
        if isinstance(self.path, dict):
            folders = files_read(self.path)
        else:
            root = Path(resolve(self.path))
            folders = folders_by_split(root) if root.is_dir() else {}
        if not folders or not all((f / self.folders[0]).is_dir() or s == "predict" for s, f in folders.items()):
            return super().read_images()
        columns = (self.image_column, self.mask_column)
        return self.of_files(
            {split: read_mask_folders(f, split, columns, self.folders) for split, f in folders.items()}
        )

    def names_in_train(self) -> list[str]:
        raise AssertionError("names or their number are given")

    def columns(self, split: str) -> Sequence[str | None]:
        return [self.image_column, None if split == "predict" else self.mask_column]

    def encode(self, table: datasets.Dataset, split: str) -> Any:
        """Return rows that are decoded when batches are made."""
        images = self.cells(table, split, self.image_column)
        if split == "predict":
            return Rows(images, **self.transforms)
        masks = self.cells(table, split, self.mask_column)
        allowed = (self.num_classes, self.ignore_index, self.reduce_labels)
        return MaskRows(images, masks, allowed, **self.transforms)


class MaskRows(Rows):
    """`Rows` whose labels are masks.

    Args:
        images: the column of images.
        masks: the column of masks.
        allowed: number of labels, the value of pixels without one, and whether 0 is such a value too.
        transforms: arguments of `Rows`.
    """

    def __init__(self, images: Cells, masks: Cells, allowed: tuple[int, int, bool], **transforms: Any) -> None:
        super().__init__(images, **transforms)
        self.masks = masks
        self.num_classes, self.ignore_index, self.reduce_labels = allowed

    def read(self, i: int) -> dict[str, Any]:
        image = self.images.rgb(i)
        try:
            mask = read_mask(self.masks.source(i))
        except Exception as error:  # each decoder has its errors
            raise self.masks.fault(i, "a mask that opens", reason_of(error)) from error
        if mask.shape != (image.height, image.width):
            got = f"{mask.shape[1]} x {mask.shape[0]}"
            raise self.masks.fault(i, f"the size of its image, {image.width} x {image.height}", got)
        return {PIXELS: as_tensor(image), "labels": tv_tensors.Mask(torch.from_numpy(self._labels(i, mask)))}

    def _labels(self, i: int, mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The mask's values as labels; a value that is none raises a BadImageError."""
        ignored = mask == self.ignore_index
        if self.reduce_labels:
            ignored |= mask == 0
            mask = mask - 1
        wrong = np.unique(mask[~ignored & ((mask < 0) | (mask >= self.num_classes))]) + int(self.reduce_labels)
        if len(wrong):
            last = self.num_classes - 1 + int(self.reduce_labels)
            got = f"the values {first_few([str(value) for value in wrong])}"
            raise self.masks.fault(i, f"labels from 0 to {last} or {self.ignore_index}", got)
        return np.where(ignored, self.ignore_index, mask)


def read_mask(source: Any) -> np.ndarray[Any, Any]:
    """The values of an image of one channel, (h, w) int64; OSError and ValueError where it is none."""
    with open_image(source) as image:
        if image.mode not in ONE_CHANNEL:
            raise ValueError(f"an image of mode {image.mode}: a mask has one channel, whose values are labels' numbers")
        return np.asarray(image).astype(np.int64)


def read_mask_folders(folder: Path, split: str, columns: Sequence[str], names: Sequence[str]) -> datasets.Dataset:
    """A table with a row for each image: its path, and that of the mask with the same name.

    Args:
        split: images of `predict` need no masks.
        columns: names of the two columns.
        names: of the folders of images and of masks.

    Raises:
        LoRAError: there is no image, or one without a mask, or a mask without an image.
    """
    images, masks = (folder / name for name in names)
    if not images.is_dir() and split == "predict":
        images = folder
    images_by_stem = {_stem(file, images): file for file in some_images(images)}
    if split == "predict":
        return datasets.Dataset.from_dict({columns[0]: [str(file) for file in images_by_stem.values()]})
    if not masks.is_dir():
        raise LoRAError(f"no folder {masks} beside {images}")
    mask_files = {_stem(file, masks): file for file in image_files(masks)}
    for what, first, second in (
        ("images without a mask", images_by_stem, mask_files),
        ("masks without an image", mask_files, images_by_stem),
    ):
        alone = sorted(str(first[stem]) for stem in first.keys() - second.keys())
        if alone:
            raise LoRAError(f"{folder} has {what} of the same name: {first_few(alone)}")
    rows = {
        columns[0]: [str(file) for file in images_by_stem.values()],
        columns[1]: [str(mask_files[stem]) for stem in images_by_stem],
    }
    return datasets.Dataset.from_dict(rows)


def _stem(file: Path, root: Path) -> str:
    return str(file.relative_to(root).with_suffix(""))
