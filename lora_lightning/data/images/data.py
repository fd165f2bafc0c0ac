"""Images with one label each, in tables or in a folder for each label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from lora_lightning.backbones.locate import resolve
from lora_lightning.data.classification import OneLabel
from lora_lightning.data.images.rows import Rows
from lora_lightning.data.images.table import (
    SUFFIXES,
    ImageTable,
    folders_by_split,
    image_files,
    some_images,
    visible_folders,
)
from lora_lightning.data.io.tables import files_read, is_saved, known_split
from lora_lightning.lora.errors import LoRAError, first_few, first_line

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""A folder of images with such a file is an imagefolder of `datasets`."""


class ImageData(OneLabel, ImageTable):
    """Folders, tables or a Hugging Face set of images to batches of `pixel_values` (n, 3, h, w) and `labels` (n,).

    Args:
        path: a folder with one folder of images for each class, or with such folders under `train`, `val` and `test`;
            a table (CSV, TSV, JSONL, Parquet) with a column of paths; files or folders by split; a saved `datasets`
            directory or an imagefolder with its metadata file; or a set on the hub with an `Image` column.
        image_column: the image.
        label_column: the label, a name or a number.
        label_names: names in the order of their numbers. By default the set's, else the sorted values in train.
        reader: for other forms, a function of yours by its `module.name`: from `path` to (images, labels), or to
            such pairs by split. Images are arrays (h, w), (h, w, 3) or (h, w, 4) of uint8, or (h, w) of uint16.
        drop_duplicates: keep the first of images with the same content.
        images: arguments of `ImageTable` and `TableData` by name.
    """

    def __init__(
        self,
        path: str | dict[str, str],
        image_column: str = "image",
        label_column: str = "label",
        label_names: list[str] | None = None,
        reader: Callable[[str], Any] | None = None,
        drop_duplicates: bool = False,
        **images: Any,
    ) -> None:
        super().__init__(path, **images)
        self.image_column, self.label_column = image_column, label_column
        self.image_columns, self.input_columns = [image_column], [image_column]
        self.target_columns = [label_column]
        self.given_label_names, self.reader, self.drop_duplicates = label_names, reader, drop_duplicates

    def read_images(self) -> dict[str, datasets.Dataset]:
        if self.reader is not None:
            return self._from_reader(self.reader)
        if isinstance(self.path, dict):
            folders = folders_by_split(self.path)
            if all(not folder.suffix or folder.is_dir() for folder in folders.values()):
                return self.read_folders(folders)
        elif (root := Path(resolve(self.path))).is_dir() and not is_saved(root):
            if any((folder / name).is_file() for folder in (root, *visible_folders(root)) for name in METADATA):
                return read_imagefolder(root)
            if not files_read(self.path):
                return self.read_folders(folders_by_split(self.path))
        return super().read_images()

    def read_folder(self, folder: Path, *, predict: bool) -> dict[str, list[str]]:
        """Each image's path, and the name of its class's folder.

        The builder `imagefolder` of `datasets` is not used: it names a class by the innermost folder, ignores a class
        without images, and takes a class whose name contains `test` or `val` for a split.
        """
        if predict:
            return {self.image_column: list(map(str, some_images(folder)))}
        classes = {folder.name: image_files(folder) for folder in visible_folders(folder)}
        if not classes:
            loose = " but loose images" if image_files(folder) else ""
            raise LoRAError(f"{folder} holds no folders{loose}: expected one for each class, with its images in it")
        if empty := [name for name, files in classes.items() if not files]:
            raise LoRAError(
                f"{folder} has folders without an image ({', '.join(SUFFIXES)}): {first_few(empty)}; remove them, or"
                " put the images of that class there"
            )
        return {
            self.image_column: [str(file) for files in classes.values() for file in files],
            self.label_column: [name for name, files in classes.items() for _ in files],
        }

    def _from_reader(self, reader: Callable[[Any], Any]) -> dict[str, datasets.Dataset]:
        splits = reader(self.path if isinstance(self.path, dict) else resolve(self.path))
        tables = {}
        for split, pair in (splits if isinstance(splits, Mapping) else {"train": splits}).items():
            lengths = [len(part) for part in pair if isinstance(part, Sized)] if isinstance(pair, tuple) else []
            if len(lengths) != 2 or lengths[0] != lengths[1]:
                raise LoRAError(
                    "reader: expected images and as many labels, (images, labels), got a"
                    f" {type(pair).__name__} of lengths {lengths}"
                )
            first, labels = len(self._arrays), np.asarray(pair[1]).tolist()
            self._arrays += list(pair[0])
            columns = {self.image_column: range(first, len(self._arrays)), self.label_column: labels}
            tables[known_split(split)] = datasets.Dataset.from_dict(columns)
        return tables

    def filter(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        if not self.drop_duplicates or split == "predict":
            return table
        cells, rows = self.cells(table, split, self.image_column), dict[bytes, int]()
        for i in range(len(table)):
            rows.setdefault(cells.digest(i), i)
        return table if len(rows) == len(table) else table.select(rows.values())

    def encode(self, table: datasets.Dataset, split: str) -> Any:
        targets: dict[str, Any] = {} if split == "predict" else {"labels": self.targets(table, split)}
        return Rows(self.cells(table, split, self.image_column), **self.transforms, **targets)


def read_imagefolder(root: Path) -> dict[str, datasets.Dataset]:
    """Read images with a metadata file by `datasets`: tables by split with the column `image`."""
    try:
        loaded: Any = datasets.load_dataset("imagefolder", data_dir=str(root))
    except Exception as error:  # datasets wraps errors in many types
        raise LoRAError(f"{root} cannot be read as an imagefolder: {first_line(error.__cause__ or error)}") from error
    return {known_split(str(split)): table for split, table in loaded.items()}
