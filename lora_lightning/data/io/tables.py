"""Tables from files, directories and the hub, read by Hugging Face `datasets`, their values and their faults."""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import fsspec
import numpy as np
import pyarrow.compute

from lora_lightning.backbones.locate import refuse_not_there, resolve
from lora_lightning.data.io.splits import split_name
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
NO_ROWS = "corresponds to no data"
"""Part of datasets' error for a file without rows."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zip", ".zst")

Readers = Mapping[str, Callable[[str], datasets.Dataset]]
"""A caller's readers of files by suffix, beside or in place of the usual ones."""


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
        readers: readers of files by suffix.

    Raises:
        LoRAError: a file is missing, empty, or of an unknown kind.
    """
    readers = readers or {}
    if isinstance(path, dict):
        _refuse_two({split: known_split(split) for split in path})
        return {known_split(split): _read_part(part, name, text_by, readers, streaming) for split, part in path.items()}
    location = Path(resolve(path))
    if is_saved(location):
        return _from_disk(location, streaming)
    files = files_read(path, readers)
    if location.is_dir() and "train" not in files:
        corpus = (
            "; YAML dialogues: from a clone, take demos.dialogues.DialogueData" if any(location.glob("*.yml")) else ""
        )
        raise LoRAError(
            f"{location} holds neither a saved dataset nor a file such as train.csv, train.jsonl, train.parquet{corpus}"
        )
    if not files and location.suffix in (*READERS, *COMPRESSED, *readers):
        files = {"train": location}  # which is not there
    if files:
        return {split: _read_file(str(file), text_by, readers, streaming) for split, file in files.items()}
    return _by_split(_from_hub(path, name, None, streaming))


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` made the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def files_read(path: str | dict[str, str], readers: Readers | None = None) -> dict[str, Path]:
    """The files of rows by split, in a folder those that are named like one; empty for a set on the hub."""
    if isinstance(path, dict):
        return {known_split(split): Path(resolve(file)) for split, file in path.items()}
    location = Path(resolve(path))
    if not location.is_dir():
        return {"train": location} if location.is_file() else {}
    known = (*READERS, *(readers or ()))
    names = [file.name for file in sorted(location.iterdir()) if file.is_file() and _kind(file) in known]
    splits = {name: split_name(name.split(".")[0]) for name in names}
    _refuse_two(splits)
    return dict(sorted((split, location / name) for name, split in splits.items() if split))


def source_of(path: str | dict[str, str], split: str, readers: Readers | None = None) -> str:
    """The source of a split's rows for errors: its file, or the set."""
    files = files_read(path, readers)
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
            names, _ = first_rows(str(file), "\t" if _kind(file) == ".tsv" else ",")
            if doubled := sorted({name for name in names if names.count(name) > 1}):
                by_split[split] = doubled
    return by_split


def check_names(
    names: Sequence[str], columns: Sequence[str | None], where: str, settings: Mapping[str, Any] | None = None
) -> None:
    """Raise for a column that is not among a table's names.

    Args:
        where: the set's name in errors.
        settings: the options with column names, such as `label_column`.
    """
    known = [name for name in names if name != ROW]
    for column in columns:
        if column is not None and column not in names:
            if advice := separator_advice(known):
                raise LoRAError(f"{where}, has the one column {known[0]!r}: {advice}")
            options = (name for name, value in (settings or {}).items() if name.endswith("_column") and value == column)
            option = next(options, None)
            guess, by = did_you_mean(column, known), f" with {option}" if option else ""
            advice = f"{guess} say so{by}" if guess and by else guess or f": name another{by}"
            raise LoRAError(f"{where}, has no column '{column}'{advice} (columns: {', '.join(known)})")


def known_split(split: str) -> str:
    """`split_name` of a split that a config names; a name of no split is refused."""
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


def _refuse_two(names: Mapping[str, str | None]) -> None:
    """Raise where two names are of one split, such as `dev` and `val`: one of them would not be read."""
    seen: dict[str, str] = {}
    for name, split in names.items():
        if split and seen.setdefault(split, name) != name:
            raise LoRAError(f"{seen[split]} and {name} are both the {split} set: name one file for each in data.path")


def _read_file(file: str, text_by: TextBy, readers: Readers, streaming: bool) -> Any:
    _check_file(Path(file))
    kind = _kind(Path(file))
    if Path(file).suffix.lower() in readers:
        return readers[kind](file)
    if kind not in READERS:
        known = dict.fromkeys((*READERS, *readers))
        raise LoRAError(f"{file}: expected one of {', '.join(known)}, got '{kind or Path(file).name}'")
    by_kind: dict[str, dict[str, Any]] = {".tsv": {"delimiter": "\t"}, ".txt": {"sample_by": text_by}}
    reader, options = READERS[kind], by_kind.get(kind, {})
    delimiter = options.get("delimiter", ",")
    # pandas silently takes surplus fields on the left for an index in every row: of an unquoted `a, b` it keeps `b`.
    if reader == "csv" and (fault := too_wide(1, *first_rows(file, delimiter), delimiter)):
        raise LoRAError(f"{file}, {fault}")
    files = {"train": glob.escape(file)}
    if streaming:
        return datasets.load_dataset(reader, data_files=files, streaming=True, **options)["train"]
    try:
        table = datasets.load_dataset(reader, data_files=files, **options)["train"]
        if reader == "json":
            table.data.table.validate(full=True)  # its reader accepts bytes that are no text, which fail later
    except Exception as error:  # datasets wraps each reader's errors
        cause = error.__cause__ or error
        cause = cause.__cause__ or cause
        if NO_ROWS in str(cause):
            raise LoRAError(f"{file} holds no rows") from error
        raise LoRAError(f"{file}, {fault_in(file, reader, cause, delimiter)}") from error
    if not len(table):
        raise LoRAError(f"{file} holds no rows")
    return table


def _check_file(path: Path) -> None:
    """Raise where a file is missing or empty."""
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*")]) if path.parent.is_dir() else ""
        if path.parts[:1] == ("~",) or "$" in str(path):
            near = ": neither ~ nor $NAME is filled in here, so write the whole path"
        raise LoRAError(f"no file {path}{near}")
    if path.stat().st_size == 0:
        raise LoRAError(f"{path} is empty")


def _read_part(file: str, name: str | None, text_by: TextBy, readers: Readers, streaming: bool) -> Any:
    """One split: a file, or `SET@PART` of the hub."""
    on_hub, _, part = file.partition("@")
    if part and not Path(file).exists():
        return _from_hub(on_hub, name, part, streaming)
    location = Path(resolve(file))
    if (location / "state.json").is_file():  # one table of save_to_disk
        return _from_disk(location, streaming)["train"]
    return _read_file(str(location), text_by, readers, streaming)


def _from_hub(path: str, name: str | None, part: str | None, streaming: bool) -> Any:
    refuse_not_there("set", path)
    try:
        return datasets.load_dataset(path, name, split=part, streaming=streaming)
    except Exception as error:  # many kinds: no network, no such set, a set that needs a configuration
        what = f"no part '{part}' of a set '{path}' found on the hub"
        what = what if part else f"no set '{path}': neither a file nor a directory nor found on the hub"
        raise LoRAError(f"{what} ({first_line(error)})") from error


def _from_disk(path: Path, streaming: bool) -> dict[str, Any]:
    """Read a directory of `save_to_disk`."""
    loaded = datasets.load_from_disk(str(path))
    tables = _by_split({"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded)
    return {split: table.to_iterable_dataset() for split, table in tables.items()} if streaming else tables


def _by_split(loaded: Mapping[Any, Any]) -> dict[str, Any]:
    names = {str(split): split_name(str(split)) for split in loaded}
    _refuse_two(names)
    return {split: loaded[name] for name, split in names.items() if split}


ROW = "__row__"
"""The column with each example's row in its file, counted from 1, for errors."""


def values_of(table: datasets.Dataset, column: str) -> Iterator[Any]:
    """A column's values in order, read by the thousand: `table[column]` reads row by row, which is 300 times slower."""
    for rows in table.select_columns(column).iter(batch_size=1_000):
        yield from rows[column]


def cells_of(table: datasets.Dataset, *columns: str) -> Iterator[tuple[Any, ...]]:
    """The values of these columns, row by row."""
    return zip(*(values_of(table, column) for column in columns), strict=True)


def lengths_of(table: datasets.Dataset, column: str = "input_ids") -> list[int]:
    """The length of each row's list, without reading the lists."""
    batches = table.select_columns(column).with_format("arrow").iter(10_000)
    return [n for batch in batches for n in pyarrow.compute.list_value_length(batch[column]).to_pylist()]


def with_row_numbers(table: datasets.Dataset) -> datasets.Dataset:
    """The table with each row's number in the column `ROW`."""
    return table if ROW in table.column_names else table.add_column(ROW, np.arange(1, len(table) + 1))


UNCLOSED = re.compile(r"EOF inside string starting at row (\d+)")
WANTED = 'expected an object such as {"text": ...}'


def fault_in(file: str, reader: str, error: BaseException, delimiter: str = ",") -> str:
    """The error in one line, with the row, counted from 1, where it can be found.

    Args:
        file: may be compressed.
        reader: `csv`, `json` or `parquet`.
        error: the reader's.
        delimiter: between a CSV's fields.
    """
    reason = " ".join(str(error).split()) or type(error).__name__
    place = None
    try:
        with fsspec.open(file, "rb", compression="infer") as opened:
            if reader == "json":
                place = _in_json(opened)
            elif reader == "csv":
                place = _in_csv(opened, reason, delimiter)
    except (OSError, EOFError, csv.Error):  # from decompression, or Python's reader of CSV
        pass
    return place or f"cannot be read as {reader}: {reason}"


def first_rows(file: str, delimiter: str = ",") -> tuple[list[str], list[str]]:
    """A CSV's header and its first row; empty where they cannot be read, of which the table's reader tells."""
    try:
        with fsspec.open(file, "rb", compression="infer") as opened:
            rows = csv.reader((line.decode("utf-8-sig") for line in opened), delimiter=delimiter)
            return next(rows, []), next(rows, [])
    except (OSError, EOFError, UnicodeDecodeError, csv.Error):
        return [], []


def too_wide(row: int, header: list[str], fields: list[str], delimiter: str) -> str | None:
    """The error where a CSV's row has more fields than its header; else None."""
    if len(fields) <= len(header):
        return None
    advice = separator_advice(header) or f"a text with {delimiter!r} in it stands in quotes"
    return f"row {row}: expected {len(header)} fields ({', '.join(header)}), got {len(fields)}; {advice}"


def separator_advice(header: Sequence[str]) -> str:
    """Advice for a header of one field with another separator in it; else an empty text."""
    sign = next((sign for sign in (";", "\t", "|") if sign in header[0]), None) if len(header) == 1 else None
    advice = f"its cells seem to be separated by {sign!r}; a .csv is separated by commas, a .tsv by tabs"
    return advice if sign else ""


def _in_json(opened: Any) -> str | None:
    """The error in a line of JSON Lines, or in one array of all rows."""
    row = 0
    for line in opened:
        if not line.strip():
            continue
        row += 1
        if row == 1 and line.lstrip().startswith(b"["):
            return _in_array(line + opened.read())
        try:
            value = json.loads(line)
        except UnicodeDecodeError as error:
            return f"row {row}: {_not_utf8(error)}"
        except json.JSONDecodeError as error:
            return f"row {row}: {WANTED}, got what is not JSON ({error.msg}: character {error.pos + 1})"
        if not isinstance(value, dict):
            return f"row {row}: {WANTED}, got {json.dumps(value)[:40]}"
    return None


def _in_array(whole: bytes) -> str | None:
    try:
        rows = json.loads(whole)
    except UnicodeDecodeError as error:
        return _not_utf8(error)
    except json.JSONDecodeError as error:
        return f"is not JSON ({error})"
    wrong = (f"row {i}: {WANTED}, got {json.dumps(row)[:40]}" for i, row in enumerate(rows, 1) if type(row) is not dict)
    return next(wrong, None)


def _in_csv(opened: Any, reason: str, delimiter: str) -> str | None:
    if unclosed := UNCLOSED.search(reason):
        return f"row {unclosed[1]}: a quotation mark opens a text and none closes it"
    rows = csv.reader((line.decode() for line in opened), delimiter=delimiter)
    header: list[str] = []
    row = 0
    try:
        header = next(rows, [])
        for row, fields in enumerate(rows, start=1):
            if wide := too_wide(row, header, fields, delimiter):
                return wide
    except UnicodeDecodeError as error:
        return f"row {row + 1}: {_not_utf8(error)}" if header else f"its header is {_not_utf8(error)}"
    return None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x}): save the file as UTF-8"
