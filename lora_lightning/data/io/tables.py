"""Tables from files, directories and the hub, read by Hugging Face `datasets`, and checked."""

from __future__ import annotations

import glob
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets

from lora_lightning.backbones.locate import refuse_not_there, resolve
from lora_lightning.data.io.faults import fault_in, header_of, separator_advice, wide_first_row
from lora_lightning.data.io.rows import ROW
from lora_lightning.data.io.splits import CALLED, split_name
from lora_lightning.lora.errors import LoRAError, did_you_mean, first_line

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
"""The rows of a .txt: lines, paragraphs between blank lines, or the whole file."""
NAMES = CALLED
NO_ROWS = "corresponds to no data"
"""Part of datasets' error for a file without rows."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zip", ".zst")


Readers = Mapping[str, Callable[[str], datasets.Dataset]]
"""Readers of files by suffix."""


def read_tables(
    path: str | dict[str, str],
    name: str | None = None,
    text_by: TextBy = "line",
    readers: Readers | None = None,
    *,
    streaming: bool = False,
) -> dict[str, Any]:
    """Tables by split; with `streaming`, streams that are not read yet.

    Args:
        path: one file; files by split (`train`, `validation`, `test`, `predict`, and further sets such as
            `validation_mismatched`); a directory made by `save_to_disk` or with one file per split; or a set's
            name on the hub. `package:NAME/path` is a file inside an installed package. In place of a split's file,
            `SET@PART` is a part of a hub set in the notation of `datasets`, such as `org/set@test_sft[:500]`.
        name: the configuration of a hub set.
        text_by: the rows of a .txt; its one column is `text`.
        readers: readers of files by suffix, beside or in place of the usual ones.

    Raises:
        LoRAError: a file is missing, empty, or of an unknown kind.
    """
    user_readers = readers or {}
    if isinstance(path, dict):
        _refuse_two({split: known_split(split) for split in path})
        return {
            known_split(split): _read_part(file, name, text_by, user_readers, streaming) for split, file in path.items()
        }
    location = Path(resolve(path))
    if location.is_dir():
        if (location / "dataset_dict.json").is_file() or (location / "state.json").is_file():
            return _from_disk(str(location), streaming)
        return {
            split: _read_file(str(file), text_by, user_readers, streaming)
            for split, file in files_of(location, user_readers).items()
        }
    if location.is_file() or location.suffix in (*READERS, *COMPRESSED, *user_readers):
        return {"train": _read_file(str(location), text_by, user_readers, streaming)}
    return _from_hub(path, name, streaming)


def files_read(path: str | dict[str, str], more: Collection[str] = ()) -> dict[str, Path]:
    """The files of rows by split; empty for a set on the hub. `more` as in `reader_of`."""
    if isinstance(path, dict):
        return {known_split(split): Path(resolve(file)) for split, file in path.items()}
    location = Path(resolve(path))
    if location.is_dir():
        return _files_by_split(location, more)
    return {"train": location} if location.is_file() else {}


def source_of(path: str | dict[str, str], split: str, more: Collection[str] = ()) -> str:
    """The source of a split's rows for errors: its file, or the set."""
    files = files_read(path, more)
    file = files.get(split, files.get("train"))
    if file is not None:
        return file.name
    if isinstance(path, dict):
        return "the set"
    return Path(resolve(path)).name if Path(resolve(path)).is_dir() else path


def doubled_columns(path: str | dict[str, str]) -> dict[str, list[str]]:
    """By split the names that are in its CSV's header twice: pandas names the second of them `name.1`."""
    by_split = {}
    for split, file in files_read(path).items():
        if _kind(file) in (".csv", ".tsv") and file.is_file():
            names = header_of(str(file), "\t" if _kind(file) == ".tsv" else ",")
            if doubled := sorted({name for name in names if names.count(name) > 1}):
                by_split[split] = doubled
    return by_split


def check_columns(
    table: datasets.Dataset, columns: Sequence[str | None], where: str, settings: Mapping[str, Any] | None = None
) -> None:
    """Raise for a missing column; `where` is the set's name in errors, `settings` are the options with column names."""
    check_names(table.column_names, columns, where, settings)


def check_names(
    names: Sequence[str], columns: Sequence[str | None], where: str, settings: Mapping[str, Any] | None = None
) -> None:
    """The same for a table's column names."""
    known = [name for name in names if name != ROW]
    for column in columns:
        if column is not None and column not in names:
            if advice := separator_advice(known):
                raise LoRAError(f"{where}, has the one column {known[0]!r}: {advice}")
            settings_of_column = [
                name for name, value in (settings or {}).items() if name.endswith("_column") and value == column
            ]
            guess, by = did_you_mean(column, known), f" with {settings_of_column[0]}" if settings_of_column else ""
            advice = f"{guess} say so{by}" if guess and by else guess or f": name another{by}"
            raise LoRAError(f"{where}, has no column '{column}'{advice} (columns: {', '.join(known)})")


def known_split(split: str) -> str:
    """`split_name` of a split that a config names.

    Raises:
        LoRAError: it is no split.
    """
    name = split_name(split)
    if name is None:
        raise LoRAError(
            f"unknown split '{split}': expected train, validation, test or predict, of the last three also several, as"
            " validation_NAME"
        )
    return name


def _kind(path: Path) -> str:
    """A file's suffix without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
    return suffixes[-1] if suffixes else ""


def _files_by_split(folder: Path, more: Collection[str] = ()) -> dict[str, Path]:
    """The readable files in a folder that are named like a split, also those with suffixes in `more`."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and _kind(file) in (*READERS, *more)]
    names = {file.name: split_name(file.name.split(".")[0]) for file in files}
    _refuse_two(names)
    return dict(sorted((split, folder / name) for name, split in names.items() if split))


def _refuse_two(names: Mapping[str, str | None]) -> None:
    """Raise where two names are of one split, such as `dev` and `val`: one of them would not be read."""
    seen: dict[str, str] = {}
    for name, split in names.items():
        if split and seen.setdefault(split, name) != name:
            raise LoRAError(f"{seen[split]} and {name} are both the {split} set: name one file for each in data.path")


def _read_file(file: str, text_by: TextBy, user_readers: Readers, streaming: bool) -> Any:
    suffix = Path(file).suffix.lower()
    if suffix in user_readers:
        check_file(file)
        return user_readers[suffix](file)
    kind, options = reader_of(file, text_by, user_readers)
    if streaming:
        return datasets.load_dataset(kind, data_files={"train": glob.escape(file)}, streaming=True, **options)["train"]
    try:
        table = datasets.load_dataset(kind, data_files={"train": glob.escape(file)}, **options)["train"]
        if kind == "json":
            table.data.table.validate(full=True)  # its reader accepts bytes that are no text, which fail later
    except Exception as error:  # datasets wraps each reader's errors
        cause = error.__cause__ or error
        cause = cause.__cause__ or cause
        if NO_ROWS in str(cause):
            raise LoRAError(f"{file} holds no rows") from error
        fault = fault_in(file, kind, cause, options.get("delimiter", ","))
        raise LoRAError(f"{file}, {fault}") from error
    if not len(table):
        raise LoRAError(f"{file} holds no rows")
    return table


def check_file(file: str) -> None:
    """Raise where a file is missing or empty."""
    path = Path(file)
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*")]) if path.parent.is_dir() else ""
        if path.parts[:1] == ("~",) or "$" in file:
            near = ": neither ~ nor $NAME is filled in here, so write the whole path"
        raise LoRAError(f"no file {file}{near}")
    if path.stat().st_size == 0:
        raise LoRAError(f"{file} is empty")


def reader_of(file: str, text_by: TextBy = "line", more: Collection[str] = ()) -> tuple[str, dict[str, Any]]:
    """The reader of `datasets` for a file, and its options.

    Args:
        file: may be compressed.
        text_by: the rows of a .txt.
        more: suffixes that the caller reads itself.

    Raises:
        LoRAError: it is missing, empty, of an unknown kind, or a CSV that pandas would misread.
    """
    check_file(file)
    path = Path(file)
    kind = _kind(path)
    if kind not in READERS:
        known = dict.fromkeys((*READERS, *more))
        raise LoRAError(f"{file}: expected one of {', '.join(known)}, got '{kind or path.name}'")
    by_kind: dict[str, dict[str, Any]] = {".tsv": {"delimiter": "\t"}, ".txt": {"sample_by": text_by}}
    options = by_kind.get(kind, {})
    if READERS[kind] == "csv" and (fault := wide_first_row(file, options.get("delimiter", ","))):
        raise LoRAError(f"{file}, {fault}")
    return READERS[kind], options


def files_of(path: Path, more: Collection[str] = ()) -> dict[str, Path]:
    """A directory's files by split.

    Args:
        path: the directory.
        more: suffixes that the caller reads itself.

    Raises:
        LoRAError: there is no file for training.
    """
    files = _files_by_split(path, more)
    if "train" not in files:
        corpus = "; YAML dialogues: from a clone, take demos.dialogues.DialogueData" if any(path.glob("*.yml")) else ""
        raise LoRAError(
            f"{path} holds neither a saved dataset nor a file such as train.csv, train.jsonl, train.parquet{corpus}"
        )
    return files


def _read_part(file: str, name: str | None, text_by: TextBy, user_readers: Readers, streaming: bool) -> Any:
    """One split: a file, or `SET@PART` of the hub."""
    on_hub, _, part = file.partition("@")
    if not part or Path(file).exists():
        location = resolve(file)
        if (Path(location) / "state.json").is_file():  # one table of save_to_disk
            return _from_disk(location, streaming)["train"]
        return _read_file(location, text_by, user_readers, streaming)
    refuse_not_there("set", on_hub)
    try:
        return datasets.load_dataset(on_hub, name, split=part, streaming=streaming)
    except Exception as error:  # many kinds, as below
        reason = first_line(error)
        raise LoRAError(f"no part '{part}' of a set '{on_hub}' found on the hub ({reason})") from error


def _from_hub(path: str, name: str | None, streaming: bool) -> dict[str, Any]:
    refuse_not_there("set", path)
    try:
        return _by_split(datasets.load_dataset(path, name, streaming=streaming))
    except Exception as error:  # many kinds: no network, no such set, a set that needs a configuration
        reason = first_line(error)
        raise LoRAError(f"no set '{path}': neither a file nor a directory nor found on the hub ({reason})") from error


def _from_disk(path: str, streaming: bool) -> dict[str, Any]:
    """Read a directory of `save_to_disk`."""
    loaded = datasets.load_from_disk(path)
    tables = _by_split({"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded)
    return {split: table.to_iterable_dataset() for split, table in tables.items()} if streaming else tables


def _by_split(loaded: Mapping[Any, Any]) -> dict[str, Any]:
    names = {str(split): split_name(str(split)) for split in loaded}
    _refuse_two(names)
    return {split: loaded[name] for name, split in names.items() if split}
