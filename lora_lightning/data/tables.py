"""Tables from files, directories and the hub, read by Hugging Face `datasets`, and checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import datasets

from lora_lightning.data.splits import SPLITS
from lora_lightning.lora.errors import LoRAError, did_you_mean
from lora_lightning.paths import resolve

READERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
TextBy = Literal["line", "paragraph", "document"]
"""What a row of a .txt is: a line, what stands between blank lines, or the whole file."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zip", ".zst")
NAMES = {"train": "train", "val": "validation", "valid": "validation", "dev": "validation", "test": "test"}


def read_tables(
    path: str | dict[str, str], name: str | None = None, text_by: TextBy = "line"
) -> dict[str, datasets.Dataset]:
    """Tables by split.

    Args:
        path: one file; files by split (`train`, `validation`, `test`, `predict`); a directory made by
            `save_to_disk` or holding one file per split; or a set's name on the hub. `package:NAME/path` is a
            file inside an installed package. In the place of a split's file, `SET@PART` is a part of a hub set in the
            words of `datasets`, such as `org/set@test_sft[:500]`.
        name: which configuration of a hub set.
        text_by: what a row of a .txt is; its one column is `text`.

    Raises:
        LoRAError: a file that is missing, empty, or of a kind that is not read here.
    """
    if isinstance(path, dict):
        return {_split_name(split): _read_part(file, name, text_by) for split, file in path.items()}
    found = Path(resolve(path))
    if found.is_dir():
        return _read_directory(found, text_by)
    if found.is_file() or found.suffix in READERS or found.suffix in COMPRESSED:
        return {"train": _read_file(str(found), text_by)}
    return _from_hub(path, name)


def source_of(path: str | dict[str, str], split: str) -> str:
    """Where a split's rows come from, as a person would name it: its file, or the set."""
    if isinstance(path, dict):
        files = {_split_name(name): file for name, file in path.items()}
        return Path(files.get(split, files.get("train", ""))).name or "the set"
    found = Path(resolve(path))
    if found.is_dir():
        files = {NAMES.get(f.name.split(".")[0], f.name.split(".")[0]): f.name for f in found.iterdir() if f.is_file()}
        return files.get(split, files.get("train", found.name))
    return found.name if found.is_file() else path


def check_columns(table: datasets.Dataset, columns: Sequence[str | None], split: str) -> None:
    """Raise where a named column is not there."""
    for column in columns:
        if column is not None and column not in table.column_names:
            raise LoRAError(
                f"the {split} set has no column '{column}'{did_you_mean(column, table.column_names)}"
                f" (columns: {', '.join(table.column_names)})"
            )


def _split_name(split: str) -> str:
    known = {*SPLITS, "predict", *NAMES}
    if split not in known:
        raise LoRAError(f"unknown split '{split}': expected train, validation, test or predict")
    return NAMES.get(split, split)


def _read_file(file: str, text_by: TextBy) -> datasets.Dataset:
    kind, options = reader_of(file, text_by)
    try:
        table = datasets.load_dataset(kind, data_files={"train": file}, **options)["train"]
    except Exception as error:  # datasets wraps each reader's own errors in its own
        cause = error.__cause__ or error
        raise LoRAError(f"{file} cannot be read as {kind}: {str(cause).strip().splitlines()[0]}") from error
    if not len(table):
        raise LoRAError(f"{file} holds no rows")
    return table


def reader_of(file: str, text_by: TextBy = "line") -> tuple[str, dict[str, Any]]:
    """Which of the readers of `datasets` reads a file, and with what options.

    Raises:
        LoRAError: it is not there, is empty, or of a kind that is not read here.
    """
    path = Path(file)
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*")]) if path.parent.is_dir() else ""
        raise LoRAError(f"no file {file}{near}")
    suffixes = [s for s in path.suffixes if s not in COMPRESSED]
    kind = suffixes[-1].lower() if suffixes else ""
    if kind not in READERS:
        raise LoRAError(f"{file}: expected one of {', '.join(READERS)}, got '{kind or path.name}'")
    if path.stat().st_size == 0:
        raise LoRAError(f"{file} is empty")
    options: dict[str, dict[str, Any]] = {".tsv": {"delimiter": "\t"}, ".txt": {"sample_by": text_by}}
    return READERS[kind], options.get(kind, {})


def _read_directory(path: Path, text_by: TextBy) -> dict[str, datasets.Dataset]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _by_split(datasets.load_from_disk(str(path)))
    return {split: _read_file(str(file), text_by) for split, file in files_of(path).items()}


def files_of(path: Path) -> dict[str, Path]:
    """A directory's files by split.

    Raises:
        LoRAError: none of them is for training.
    """
    files = {NAMES.get(f.name.split(".")[0], f.name.split(".")[0]): f for f in sorted(path.iterdir()) if f.is_file()}
    files = {split: file for split, file in files.items() if split in SPLITS or split == "predict"}
    if "train" not in files:
        raise LoRAError(
            f"{path} holds neither a saved dataset nor a file such as train.csv, train.jsonl, train.parquet"
        )
    return files


def _read_part(file: str, name: str | None, text_by: TextBy) -> datasets.Dataset:
    """One split: a file, or `SET@PART` of the hub."""
    on_hub, _, part = file.partition("@")
    if not part or Path(file).exists():
        return _read_file(resolve(file), text_by)
    try:
        return datasets.load_dataset(on_hub, name, split=part)
    except Exception as error:  # many kinds, as below
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoRAError(f"no part '{part}' of a set '{on_hub}' found on the hub ({reason})") from error


def _from_hub(path: str, name: str | None) -> dict[str, datasets.Dataset]:
    try:
        return _by_split(datasets.load_dataset(path, name))
    except Exception as error:  # many kinds: no network, no such set, a set that needs a configuration
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoRAError(f"no set '{path}': neither a file nor a directory nor found on the hub ({reason})") from error


def _by_split(loaded: datasets.Dataset | datasets.DatasetDict) -> dict[str, datasets.Dataset]:
    if isinstance(loaded, datasets.Dataset):
        return {"train": loaded}
    return {NAMES.get(str(split), str(split)): table for split, table in loaded.items()}
