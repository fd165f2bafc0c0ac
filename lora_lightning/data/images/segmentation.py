"""Images with a label for each pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from lora_lightning.data.classification import LabelNames
from lora_lightning.data.images.rows import PIXELS, Cells, Mask, Rows, open_image
from lora_lightning.data.images.table import ImageTable, folders_by_split, image_files, some_images
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
        self.image_columns = [image_column, mask_column]
        self.input_columns, self.target_columns = [image_column], [mask_column]
        self.folders = (image_folder, mask_folder)
        self.ignore_index, self.reduce_labels = ignore_index, reduce_labels

    def read_images(self) -> dict[str, datasets.Dataset]:
        folders = folders_by_split(self.path)
        labelled = [folder / self.folders[0] for split, folder in folders.items() if not split.startswith("predict")]
        if folders and all(folder.is_dir() for folder in labelled):
            return self.read_folders(folders)
        return super().read_images()

    def read_folder(self, folder: Path, *, predict: bool) -> dict[str, list[str]]:
        """Each image's path, and that of the mask with the same name; there must be no image or mask alone."""
        root, mask_root = (folder / name for name in self.folders)
        if predict:
            return {self.image_column: list(map(str, some_images(root if root.is_dir() else folder)))}
        if not mask_root.is_dir():
            raise LoRAError(f"no folder {mask_root} beside {root}")
        images = {file.relative_to(root).with_suffix(""): str(file) for file in some_images(root)}
        masks = {file.relative_to(mask_root).with_suffix(""): str(file) for file in image_files(mask_root)}
        pairs = (("images without a mask", images, masks), ("masks without an image", masks, images))
        for what, ones, others in pairs:
            if alone := sorted(ones[name] for name in ones.keys() - others.keys()):
                raise LoRAError(f"{folder} has {what} of the same name: {first_few(alone)}")
        return {self.image_column: list(images.values()), self.mask_column: [masks[name] for name in images]}

    def encode(self, table: datasets.Dataset, split: str) -> Any:
        images = self.cells(table, split, self.image_column)
        if split == "predict":
            return Rows(images, **self.transforms)
        masks = self.cells(table, split, self.mask_column)
        return MaskRows(images, masks, self.num_classes, self.ignore_index, self.reduce_labels, **self.transforms)


class MaskRows(Rows):
    """`Rows` whose labels are masks; `ignored` is a pixel without one, with `reduce` 0 too, and 1 the first label."""

    def __init__(
        self, images: Cells, masks: Cells, num_classes: int, ignored: int, reduce: bool, **transforms: Any
    ) -> None:
        super().__init__(images, **transforms)
        self.masks, self.num_classes, self.ignored, self.reduce = masks, num_classes, ignored, reduce

    def read(self, i: int) -> dict[str, Any]:
        """An example's image and its mask; values that are no labels are refused."""
        image, mask = self.images.read(i), self.masks.read(i, read_mask, "a mask")
        if mask.shape != (image.height, image.width):
            got = f"{mask.shape[1]} x {mask.shape[0]}"
            raise self.masks.fault(i, f"the size of its image, {image.width} x {image.height}", got)
        first = int(self.reduce)
        last = self.num_classes - 1 + first
        unlabelled = (mask == self.ignored) | (self.reduce & (mask == 0))
        wrong = np.unique(mask[~unlabelled & ((mask < first) | (mask > last))])
        if len(wrong):
            got = f"the values {first_few(list(map(str, wrong)))}"
            raise self.masks.fault(i, f"labels from 0 to {last} or {self.ignored}", got)
        labels = np.where(unlabelled, self.ignored, mask - first)
        return {PIXELS: image, "labels": Mask(torch.from_numpy(labels))}


def read_mask(source: Any) -> np.ndarray[Any, Any]:
    """The values of an image of one channel, (h, w) int64; OSError and ValueError where it is none."""
    with open_image(source) as image:
        if image.mode not in ONE_CHANNEL:
            raise ValueError(f"an image of mode {image.mode}: a mask has one channel, whose values are labels' numbers")
        return np.asarray(image).astype(np.int64)
