"""Folders of images as tables: one row for each file, with its folder's name as the label."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import datasets

from lora_lightning.data.images.rows import SUFFIXES
from lora_lightning.data.io.splits import SPLITS, split_name
from lora_lightning.lora.errors import LoRAError, first_few, first_line

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""A folder of images with such a file is an imagefolder of `datasets`."""


def image_files(folder: Path) -> list[Path]:
    """All images below a folder at any depth, sorted by name, without hidden files and folders."""
    files_found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files_found += [
            Path(parent) / f for f in sorted(files) if not f.startswith(".") and f.lower().endswith(SUFFIXES)
        ]
    return files_found


def _some_images(folder: Path) -> list[Path]:
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
        return datasets.Dataset.from_dict({image: [str(file) for file in _some_images(folder)]})
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
    images_by_stem = {_stem(file, images): file for file in _some_images(images)}
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


def read_imagefolder(root: Path) -> datasets.DatasetDict:
    """Read images with a metadata file by `datasets`: tables with the column `image`, undecoded."""
    try:
        loaded = datasets.load_dataset("imagefolder", data_dir=str(root))
    except Exception as error:  # datasets wraps errors in many types
        raise LoRAError(f"{root} cannot be read as an imagefolder: {first_line(error.__cause__ or error)}") from error
    assert isinstance(loaded, datasets.DatasetDict)
    return loaded
