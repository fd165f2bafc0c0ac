"""Images with one label each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from lora_lightning.backbones.locate import resolve
from lora_lightning.data.classification import OneLabel
from lora_lightning.data.images.files import (
    folders_by_split,
    is_imagefolder,
    read_class_folders,
    read_imagefolder,
)
from lora_lightning.data.images.rows import Rows
from lora_lightning.data.images.table import ImageTable
from lora_lightning.data.images.transforms import (
    evaluation_transform,
    training_transform,
)
from lora_lightning.data.io.rows import values_of
from lora_lightning.data.io.splits import SPLITS
from lora_lightning.data.io.tables import NAMES, READERS, read_tables
from lora_lightning.lora.errors import LoRAError


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
        by_split = self.path if isinstance(self.path, dict) else None
        folders = (
            {split: Path(resolve(path)) for split, path in by_split.items()}
            if by_split is not None
            else _image_folders(Path(resolve(str(self.path))))
        )
        if folders and all(not folder.suffix or folder.is_dir() for folder in folders.values()):
            columns = (self.image_column, self.label_column)
            named = {NAMES.get(split, split): folder for split, folder in folders.items()}
            tables = {split: read_class_folders(folder, split, columns) for split, folder in named.items()}
            self.files = {split: list(values_of(table, self.image_column)) for split, table in tables.items()}
            return tables
        if by_split is None and (root := Path(resolve(str(self.path)))).is_dir() and is_imagefolder(root):
            return {NAMES.get(str(split), str(split)): table for split, table in read_imagefolder(root).items()}
        return read_tables(self.path, self.name)

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
            tables[NAMES.get(split, split)] = datasets.Dataset.from_dict(
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
            digest = _digest(cells.source(i))
            if digest not in seen:
                rows.append(i)
            seen.add(digest)
        return table if len(rows) == len(table) else table.select(rows)

    def majority_share(self, split: str) -> float:
        """Accuracy on `split` of always predicting the most common label of train."""
        train, labels = (list(self.encoded_rows(s).labels) for s in ("train", split))  # type: ignore[attr-defined]
        return labels.count(max(set(train), key=train.count)) / len(labels)

    def encode(self, table: datasets.Dataset, split: str) -> Any:
        """Return rows that are decoded when batches are made."""
        return Rows(
            self.cells(table, split, self.image_column),
            evaluation=evaluation_transform(self.preprocessing),
            training=training_transform(self.preprocessing, self.augment),
            seed=self.seed,
            labels=None if split == "predict" else self.label_numbers(table, split),
        )


def _image_folders(root: Path) -> dict[str, Path]:
    """The folders of a directory by split; empty where it has tables, a saved set or an imagefolder's metadata."""
    if not root.is_dir() or (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return {}
    names = [f.name.split(".")[0] for f in root.iterdir() if f.is_file() and set(f.suffixes) & set(READERS)]
    if is_imagefolder(root) or any(NAMES.get(name, name) in (*SPLITS, "predict") for name in names):
        return {}
    return folders_by_split(root)


def _digest(source: Any) -> bytes:
    """The digest of an image's stored content."""
    if isinstance(source, np.ndarray):
        data = repr((source.shape, source.dtype.str)).encode() + source.tobytes()
    elif isinstance(source, Mapping) and source.get("bytes") is not None:
        data = source["bytes"]
    elif isinstance(source, str) and Path(source).is_file():
        data = Path(source).read_bytes()
    else:
        data = repr(source).encode()
    return hashlib.sha256(data).digest()


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of lengths {[len(part) if hasattr(part, '__len__') else '?' for part in value]}"
    return f"a {type(value).__name__}"
