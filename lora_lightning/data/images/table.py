"""Bases of DataModules over images: files or cells with images, a check, preprocessing and augmentation."""

from __future__ import annotations

import glob
import random
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import datasets
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from lora_lightning.backbones.locate import resolve
from lora_lightning.data.base import TableData
from lora_lightning.data.images.rows import AugmentedOrder, Cells, open_image
from lora_lightning.data.images.transforms import Augmentation, Interpolation, Preprocessing, preprocessing_of
from lora_lightning.data.io.splits import SPLITS, split_name
from lora_lightning.data.io.tables import ROW, cells_of, files_read, values_of
from lora_lightning.lora.errors import LoRAError

Verify = Literal["open", "decode", "none"]

SHOWN_FROM = 20_000
"""From this number of images on, a check shows a progress bar."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Suffixes of image files, as in torchvision's ImageFolder. Other files are skipped."""


class ImageCells(TableData):
    """A `TableData` whose rows have images, decoded only when a batch needs them: pixels take more room than files.

    Args:
        path: as in `TableData`.
        image_root: the folder of relative paths in a table; the table's folder by default.
        verify: check before training that each file can be opened (`open`, the header alone) or decoded (`decode`).
        table: arguments of `TableData` by name.
    """

    image_columns: Sequence[str]

    def __init__(
        self, path: str | dict[str, str], image_root: str | None = None, verify: Verify = "open", **table: Any
    ) -> None:
        super().__init__(path, length_grouped=False, num_proc=None, **table)
        self.image_root, self.verify = image_root, verify
        self.files: dict[str, list[str]] = {}  # by split, where each row is a file of a folder
        self._arrays: list[Any] = []
        self._verified = False

    def read(self) -> dict[str, datasets.Dataset]:
        """The tables with images as paths and bytes: `datasets` would decode each row on access."""
        tables = self.read_images()
        for split, table in tables.items():
            for column in self.image_columns:
                feature = table.features.get(column)
                parts = isinstance(feature, dict) and feature.keys() == {"bytes", "path"}
                if parts or feature == datasets.Value("binary") or isinstance(feature, datasets.Image):
                    tables[split] = tables[split].cast_column(column, datasets.Image(decode=False))
        return tables

    def read_images(self) -> dict[str, datasets.Dataset]:
        """Tables by split, with images in any form."""
        return super().read()

    def bad_cell(self, split: str, row: int, column: str, expected: str, got: object, hint: str = "") -> LoRAError:
        """Return the error for a value; where each row is a file, it names the file in place of the row."""
        if not self.files:
            return super().bad_cell(split, row, column, expected, got, hint)
        file = self.files.get(split, self.files.get("train", []))[row - 1]
        return LoRAError(f"{file}: expected {expected}, got {got!r}{hint}")

    def check(self, table: datasets.Dataset, split: str) -> None:
        """Raise for a cell that is neither a path nor an image."""
        for column in self._columns_of_paths(table):
            for row, cell in cells_of(table, ROW, column):
                if not isinstance(cell, str) or not cell:
                    raise self.bad_cell(split, row, column, "the path of an image", cell)

    def _columns_of_paths(self, table: datasets.Dataset) -> list[str]:
        """The columns of images that are not inside the table; rows of predict have no masks."""
        columns = [] if self._arrays else [column for column in self.image_columns if column in table.column_names]
        return [column for column in columns if not isinstance(table.features[column], datasets.Image)]

    def prepare_data(self) -> None:
        """Read the tables, and raise in one process for the first image that does not open or, if asked, decode."""
        super().prepare_data()
        if self.verify == "none" or self._verified:
            return
        for split, table in self.tables.items():
            with self._kind_of_set(split) as kind:
                how: dict[str, Any] = {"desc": f"check images, {split}", "disable": len(table) < SHOWN_FROM}
                encoded: Any = self.encode(table, kind) if self.verify == "decode" else None
                columns = [] if encoded else [self.cells(table, kind, name) for name in self._columns_of_paths(table)]
                for i in tqdm(range(len(table)), leave=False, **how):
                    _ = encoded and encoded[i]
                    for cells in columns:
                        cells.read(i, open_image).close()
        self._verified = True

    def cells(self, table: datasets.Dataset, split: str, column: str) -> Cells:
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
        files = files_read(self.path)
        places = (files.get(split), files.get("train"), *files.values(), Path(resolve(str(self.path))))
        file = next(place for place in places if place)
        return file if file.is_dir() else file.parent


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

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of evaluation, read on first use."""
        how = Preprocessing() if self.preprocessing_name is None else preprocessing_of(self.preprocessing_name)
        how = how.at(self.image_size)
        options: dict[str, Any] = {name: value for name, value in self.given.items() if value is not None}
        if self.crop_share is not None:
            options["resize"] = how.size if self.crop_share == 1 else round(min(how.size) / self.crop_share)
        for name in options.keys() & {"mean", "std"}:
            options[name] = tuple(map(float, options[name]))
            if len(options[name]) != 3:
                raise LoRAError(f"{name} must be three numbers, for red, green and blue, got {options[name]}")
        return replace(how, **options)

    @property
    def transforms(self) -> dict[str, Any]:
        """Arguments of `Rows`."""
        how = self.preprocessing
        return {"evaluation": how.transform(), "training": how.transform(self.augment), "seed": self.seed}

    @property
    def image_processor(self) -> Any:
        """The preprocessing as a transformers image processor, which an export saves."""
        return self.preprocessing.processor()

    def read_folders(self, folders: dict[str, Path]) -> dict[str, datasets.Dataset]:
        """Tables of the images in folders by split, with a row for each; errors then name the file of a row."""
        tables = {}
        for split, folder in folders.items():
            if not folder.is_dir():
                raise LoRAError(f"no folder {folder}")
            columns = self.read_folder(folder, predict=split.startswith("predict"))
            self.files[split] = columns[self.image_columns[0]]
            tables[split] = datasets.Dataset.from_dict(columns)
        return tables

    @abstractmethod
    def read_folder(self, folder: Path, *, predict: bool) -> dict[str, list[str]]:
        """Columns of a folder's images and their labels; images to predict on have none."""

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


def image_files(folder: Path) -> list[Path]:
    """All images below a folder at any depth, sorted by name, without hidden files and folders."""
    files = glob.glob("**/*.*", root_dir=folder, recursive=True)  # noqa: PTH207  (rglob takes hidden ones, no links)
    return [folder / file for file in sorted(files) if file.lower().endswith(SUFFIXES)]


def some_images(folder: Path) -> list[Path]:
    """The same, of which there must be one."""
    if files := image_files(folder):
        return files
    raise LoRAError(f"{folder} holds no image ({', '.join(SUFFIXES)})")


def visible_folders(folder: Path) -> list[Path]:
    """The folders in a folder without hidden ones, sorted by name."""
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def folders_by_split(path: str | dict[str, str]) -> dict[str, Path]:
    """The folders of splits (`train`, `val`, `test`, `predict`) in a folder; without `train` the folder itself."""
    if isinstance(path, dict):
        return files_read(path)
    root = Path(resolve(path))
    if not root.is_dir():
        return {}
    named = [(split_name(folder.name.lower()), folder) for folder in visible_folders(root)]
    splits = {split: folder for split, folder in named if split in (*SPLITS, "predict")}
    if "train" not in splits:
        return {"train": root}
    for split, folder in named:
        if split in splits and folder != splits[split]:
            raise LoRAError(f"{folder} and {splits[split].name} are both the {split} set: name one of them in path")
    return splits
