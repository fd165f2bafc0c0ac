"""Bases of DataModules over images: files or cells with images, a check, preprocessing and augmentation."""

from __future__ import annotations

import os
import random
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import datasets
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from lora_lightning.backbones.locate import resolve
from lora_lightning.data.base import TableData
from lora_lightning.data.images.rows import SUFFIXES, AugmentedOrder, Cells
from lora_lightning.data.images.transforms import (
    Augmentation,
    Interpolation,
    Preprocessing,
    evaluation_transform,
    preprocessing_of,
    training_transform,
)
from lora_lightning.data.io.splits import SPLITS, split_name
from lora_lightning.data.io.tables import ROW, cells_of, files_read, values_of
from lora_lightning.lora.errors import LoRAError

Verify = Literal["open", "decode", "none"]

SHOWN_FROM = 20_000
"""From this number of images on, a check shows a progress bar."""


class ImageCells(TableData):
    """A `TableData` whose rows have images, which are decoded only when a batch needs them.

    Args:
        path: as in `TableData`.
        image_root: the folder of relative paths in a table; the table's folder by default.
        verify: check before training that each file can be opened (`open`, the header alone) or decoded (`decode`).
        table: arguments of `TableData` by name.
    """

    def __init__(
        self, path: str | dict[str, str], image_root: str | None = None, verify: Verify = "open", **table: Any
    ) -> None:
        super().__init__(path, length_grouped=False, num_proc=None, **table)
        self.image_root, self.verify = image_root, verify
        self.files: dict[str, list[str]] = {}  # by split, where each row is a file of a folder
        self._arrays: list[Any] = []
        self._verified = False

    @property
    @abstractmethod
    def image_columns(self) -> Sequence[str]:
        """Columns of images."""

    def read(self) -> dict[str, datasets.Dataset]:
        """The tables with images as paths and bytes: `datasets` would decode each row on access."""
        tables = self.read_images()
        for split, table in tables.items():
            for column in self.image_columns:
                if column in table.column_names and is_image(table.features[column]):
                    tables[split] = tables[split].cast_column(column, datasets.Image(decode=False))
        return tables

    def read_images(self) -> dict[str, datasets.Dataset]:
        """Tables by split, with images in any form."""
        return super().read()

    def of_files(self, tables: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
        """Remember that each row is a file of a folder, which errors then name."""
        self.files = {split: list(values_of(table, self.image_columns[0])) for split, table in tables.items()}
        return tables

    def bad_cell(self, split: str, row: int, column: str, expected: str, got: object, hint: str = "") -> LoRAError:
        """Return the error for a value; where each row is a file, it names the file in place of the row."""
        if not self.files:
            return super().bad_cell(split, row, column, expected, got, hint)
        file = self.files.get(split, self.files.get("train", []))[row - 1]
        return LoRAError(f"{file}: expected {expected}, got {got!r}{hint}")

    def check(self, table: datasets.Dataset, split: str) -> None:
        """Raise for a cell that is neither a path nor an image."""
        for column in self.image_columns:
            if column not in table.column_names:  # rows of predict have no masks
                continue
            feature = table.features[column]
            inside = isinstance(feature, datasets.Image) or (self._arrays and getattr(feature, "dtype", "") == "int64")
            for row, cell in () if inside else cells_of(table, ROW, column):
                if not isinstance(cell, str) or not cell:
                    raise self.bad_cell(split, row, column, "the path of an image", cell)

    def prepare_data(self) -> None:
        """Read the tables, and verify the images once in one process."""
        super().prepare_data()
        if self.verify == "none" or self._verified:
            return
        for split, table in self.tables.items():
            with self._kind_of_set(split) as kind:
                self.verify_rows(table, kind)
        self._verified = True

    def verify_rows(self, table: datasets.Dataset, split: str) -> None:
        """Raise for the first image of a split that cannot be opened or, where asked for, decoded with its mask."""
        bar: Iterable[int] = tqdm(
            range(len(table)), desc=f"check images, {split}", disable=len(table) < SHOWN_FROM, leave=False
        )
        if self.verify == "decode":
            rows = self.encode(table, split)
            for i in bar:
                _ = rows[i]
            return
        for column in self.image_columns:
            inside = isinstance(table.features.get(column), datasets.Image) and not self.files
            if column in table.column_names and not inside:  # it would have to read all images inside a table
                cells = self.cells(table, split, column)
                for i in bar:
                    cells.verify(i)

    def cells(self, table: datasets.Dataset, split: str, column: str) -> Cells:
        """A column of images of a split."""
        return Cells(
            table=table.select_columns([column]),
            column=column,
            root=self._root(split),
            arrays=self._arrays,
            rows=list(values_of(table, ROW)),
            place=None if self.files else self.place(split),
        )

    def _root(self, split: str) -> Path:
        """The folder of a split's paths: `image_root`, or the table's folder; paths from folders are complete."""
        if self.files:
            return Path()
        if self.image_root:
            return Path(resolve(self.image_root))
        if isinstance(self.path, dict):
            files = files_read(self.path)
            file = files.get(split, files.get("train", next(iter(files.values()))))
        else:
            file = Path(resolve(self.path))
        return file if file.is_dir() else file.parent

    def lengths(self, table: Any) -> None:
        return


class ImageTable(ImageCells):
    """Images, preprocessed as in the backbone's pretraining, and augmented in training.

    Args:
        path: as in `TableData`, or a folder of images.
        preprocessing: the source of size, mean, standard deviation and resizing: `timm:NAME`,
            `torchvision:ResNet50_Weights.DEFAULT`, or a transformers model's name or directory. ImageNet's by default.
        image_size: of the backbone's input in pixels, one number or height and width.
        mean: of red, green and blue in [0, 1].
        std: of red, green and blue.
        interpolation: of resizing images; masks take the nearest pixel.
        crop_share: the center crop's share of the resized image's shorter side; 1 squeezes the whole image into
            `image_size`.
        augment: random changes in training, a function of (seed, epoch, row), the same with any number of workers and
            processes; null for none.
        max_train_rows: training rows at most, chosen once by `split.seed`.
        table: arguments of `ImageCells` by name.
    """

    train_sampler = AugmentedOrder

    def __init__(
        self,
        path: str | dict[str, str],
        preprocessing: str | None = None,
        image_size: int | list[int] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        interpolation: Interpolation | None = None,
        crop_share: float | None = None,
        augment: Augmentation | None = Augmentation(),  # noqa: B008  (frozen)
        max_train_rows: int | None = None,
        **table: Any,
    ) -> None:
        super().__init__(path, **table)
        if max_train_rows is not None and max_train_rows < 1:
            raise LoRAError(f"max_train_rows must be at least 1, got {max_train_rows}")
        if crop_share is not None and not 0 < crop_share <= 1:
            raise LoRAError(f"crop_share must be above 0 and at most 1, got {crop_share}")
        self.given = {"mean": mean, "std": std, "interpolation": interpolation}
        self.preprocessing_name, self.image_size, self.crop_share = preprocessing, image_size, crop_share
        self.augment = augment or Augmentation(crop_scale=None, flip=0.0)
        self.max_train_rows = max_train_rows
        self._preprocessing: Preprocessing | None = None

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of evaluation."""
        if self._preprocessing is None:
            how = Preprocessing() if self.preprocessing_name is None else preprocessing_of(self.preprocessing_name)
            how = how.at(self.image_size)
            if self.crop_share == 1:
                how = replace(how, resize=how.size)
            elif self.crop_share is not None:
                how = replace(how, resize=round(min(how.size) / self.crop_share))
            options: dict[str, Any] = {name: value for name, value in self.given.items() if value is not None}
            for name in ("mean", "std"):
                if name in options:
                    options[name] = tuple(float(x) for x in options[name])
                    if len(options[name]) != 3:
                        raise LoRAError(f"{name} must be three numbers, for red, green and blue, got {options[name]}")
            self._preprocessing = replace(how, **options)
        return self._preprocessing

    @property
    def transforms(self) -> dict[str, Any]:
        """Arguments of `Rows`."""
        training = training_transform(self.preprocessing, self.augment)
        return {"evaluation": evaluation_transform(self.preprocessing), "training": training, "seed": self.seed}

    @property
    def image_processor(self) -> Any:
        """The preprocessing as a transformers image processor, which an export saves."""
        return self.preprocessing.processor()

    def _with_splits(self, tables: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
        tables = super()._with_splits(tables)
        train = tables.get("train")
        if self.max_train_rows is not None and train is not None and self.max_train_rows < len(train):
            rows = random.Random(self.split.seed).sample(range(len(train)), self.max_train_rows)
            tables["train"] = train.select(sorted(rows))
        return tables

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        return default_collate


def is_image(feature: Any) -> bool:
    """Whether a column has images as `datasets` stores them: by its feature, by its parts, or as bytes."""
    if isinstance(feature, datasets.Image) or feature == datasets.Value("binary"):
        return True
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"}


def image_files(folder: Path) -> list[Path]:
    """All images below a folder at any depth, sorted by name, without hidden files and folders."""
    files_found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files_found += [
            Path(parent) / f for f in sorted(files) if not f.startswith(".") and f.lower().endswith(SUFFIXES)
        ]
    return files_found


def some_images(folder: Path) -> list[Path]:
    """The same, of which there must be one."""
    if files := image_files(folder):
        return files
    raise LoRAError(f"{folder} holds no image ({', '.join(SUFFIXES)})")


def visible_folders(folder: Path) -> list[Path]:
    """The folders in a folder without hidden ones, sorted by name."""
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def folders_by_split(root: Path) -> dict[str, Path]:
    """The folders of splits (`train`, `val`, `test`, `predict`) in a folder; without `train` the folder itself."""
    named = {split_name(folder.name.lower()): folder for folder in visible_folders(root)}
    splits = {split: folder for split, folder in named.items() if split in (*SPLITS, "predict")}
    return splits if "train" in splits else {"train": root}
