"""Images with one label each, in tables or in a folder for each label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from lora_lightning.backbones.locate import resolve
from lora_lightning.data.classification import OneLabel
from lora_lightning.data.images.rows import SUFFIXES, Rows
from lora_lightning.data.images.table import ImageTable, folders_by_split, image_files, some_images, visible_folders
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

    Raises:
        LoRAError: an image that does not open, an empty folder of a class, a missing column, a label that is missing or
            not in train, with file, row and column.
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
        self.given_label_names, self.reader, self.drop_duplicates = label_names, reader, drop_duplicates

    @property
    def image_columns(self) -> Sequence[str]:
        return [self.image_column]

    def read_images(self) -> dict[str, datasets.Dataset]:
        if self.reader is not None:
            return self._from_reader(self.reader)
        root = None if isinstance(self.path, dict) else Path(resolve(self.path))
        folders = files_read(self.path) if root is None else _image_folders(root)
        if folders and all(not folder.suffix or folder.is_dir() for folder in folders.values()):
            columns = (self.image_column, self.label_column)
            return self.of_files({split: read_class_folders(f, split, columns) for split, f in folders.items()})
        if root is not None and root.is_dir() and is_imagefolder(root):
            return {known_split(str(split)): table for split, table in read_imagefolder(root).items()}
        return super().read_images()

    def _from_reader(self, reader: Callable[[str], Any]) -> dict[str, datasets.Dataset]:
        path = self.path if isinstance(self.path, dict) else resolve(self.path)
        splits = reader(path)  # type: ignore[arg-type]
        tables = {}
        for split, pair in (splits if isinstance(splits, Mapping) else {"train": splits}).items():
            if not isinstance(pair, tuple) or len(pair) != 2 or len(pair[0]) != len(pair[1]):
                raise LoRAError(f"reader: expected images and as many labels, (images, labels), got {_describe(pair)}")
            first = len(self._arrays)
            self._arrays += list(pair[0])
            numbers = list(range(first, len(self._arrays)))
            labels = np.asarray(pair[1]).tolist()
            tables[known_split(split)] = datasets.Dataset.from_dict(
                {self.image_column: numbers, self.label_column: labels}
            )
        return tables

    def columns(self, split: str) -> Sequence[str | None]:
        return [self.image_column, None if split == "predict" else self.label_column]

    def check(self, table: datasets.Dataset, split: str) -> None:
        super().check(table, split)
        if split != "predict":
            self.check_labels(table, split)

    def filter(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        if not self.drop_duplicates or split == "predict":
            return table
        cells, seen, rows = self.cells(table, split, self.image_column), set(), []
        for i in range(len(table)):
            digest = cells.digest(i)
            if digest not in seen:
                rows.append(i)
            seen.add(digest)
        return table if len(rows) == len(table) else table.select(rows)

    def encode(self, table: datasets.Dataset, split: str) -> Any:
        """Return rows that are decoded when batches are made."""
        labels = None if split == "predict" else self.label_numbers(table, split)
        return Rows(self.cells(table, split, self.image_column), labels=labels, **self.transforms)


def _image_folders(root: Path) -> dict[str, Path]:
    """The folders of a directory by split; empty where it has tables, a saved set or an imagefolder's metadata."""
    if not root.is_dir() or is_saved(root) or is_imagefolder(root) or files_read(str(root)):
        return {}
    return folders_by_split(root)


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of lengths {[len(part) if hasattr(part, '__len__') else '?' for part in value]}"
    return f"a {type(value).__name__}"


def is_imagefolder(root: Path) -> bool:
    """Whether a folder or one of its splits has a metadata file."""
    return any((folder / name).is_file() for folder in (root, *visible_folders(root)) for name in METADATA)


def read_class_folders(folder: Path, split: str, columns: Sequence[str]) -> datasets.Dataset:
    """A table with a row for each image: its path, and the name of its class's folder.

    The builder `imagefolder` of `datasets` is not used: it names a class by the innermost folder, ignores a class
    without images, and takes a class whose name contains `test` or `val` for a split.

    Args:
        split: images of `predict` need no folders of classes.
        columns: names of the two columns.

    Raises:
        LoRAError: there is no folder of a class, or one without an image.
    """
    image, label = columns
    if not folder.is_dir():
        raise LoRAError(f"no folder {folder}")
    if split == "predict":
        return datasets.Dataset.from_dict({image: [str(file) for file in some_images(folder)]})
    classes = visible_folders(folder)
    if not classes:
        loose = " but loose images" if image_files(folder) else ""
        raise LoRAError(f"{folder} holds no folders{loose}: expected one for each class, with its images in it")
    rows = [(str(file), cls.name) for cls in classes for file in image_files(cls)]
    empty = sorted({cls.name for cls in classes} - {name for _, name in rows})
    if empty:
        raise LoRAError(
            f"{folder} has folders without an image ({', '.join(SUFFIXES)}): {first_few(empty)}; remove them, or put"
            " the images of that class there"
        )
    return datasets.Dataset.from_dict({image: [file for file, _ in rows], label: [name for _, name in rows]})


def read_imagefolder(root: Path) -> datasets.DatasetDict:
    """Read images with a metadata file by `datasets`: tables with the column `image`, undecoded."""
    try:
        loaded = datasets.load_dataset("imagefolder", data_dir=str(root))
    except Exception as error:  # datasets wraps errors in many types
        raise LoRAError(f"{root} cannot be read as an imagefolder: {first_line(error.__cause__ or error)}") from error
    assert isinstance(loaded, datasets.DatasetDict)
    return loaded
