"""Tables from files, directories and the hub, read by Hugging Face `datasets`, their values and their faults."""

from __future__ import annotations

import contextlib
import csv
import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import datasets
import fsspec
import pyarrow.compute

from lora_lightning.backbones.locate import refuse_not_there, resolve
from lora_lightning.data.io.splits import split_name
from lora_lightning.lora.errors import LoRAError, did_you_mean, first_line

READERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
READERS |= dict.fromkeys((".json", ".jsonl", ".ndjson"), "json")
COMPRESSED = (".gz", ".bz2", ".xz", ".zip", ".zst")
NO_ROWS = "corresponds to no data"
"""Part of datasets' error for a file without rows."""

TextBy = Literal["line", "paragraph", "document"]
"""The rows of a .txt: lines, paragraphs between blank lines, or the whole file."""
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
    """
    read = partial(_read_file, text_by=text_by, readers=readers or {}, streaming=streaming)
    files = files_read(path, readers)
    if isinstance(path, dict):
        return {split: _read_part(str(file), name, read, streaming) for split, file in files.items()}
    location = Path(resolve(path))
    if is_saved(location):
        return _from_disk(location, streaming)
    if location.is_dir() and "train" not in files:
        corpus = "; YAML dialogues: from a clone, take demos.dialogues.DialogueData"
        raise LoRAError(
            f"{location} holds neither a saved dataset nor a file such as train.csv, train.jsonl, train.parquet"
            f"{corpus if any(location.glob('*.yml')) else ''}"
        )
    if not files and location.suffix not in (*READERS, *COMPRESSED, *(readers or ())):
        return _by_split(_from_hub(path, name, None, streaming))
    return {split: read(file) for split, file in (files or {"train": location}).items()}


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` made the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def files_read(path: str | dict[str, str], readers: Readers | None = None) -> dict[str, Path]:
    """The files of rows by split, in a folder those that are named like one; empty for a set on the hub."""
    if isinstance(path, dict):
        return _by_split({split: Path(resolve(file)) for split, file in path.items()}, known_split)
    location = Path(resolve(path))
    if not location.is_dir():
        return {"train": location} if location.is_file() else {}
    known = (*READERS, *(readers or ()))
    files = [file for file in sorted(location.iterdir()) if file.is_file() and _kind(file) in known]
    return dict(sorted(_by_split({file.name: file for file in files}).items()))


def source_of(path: str | dict[str, str], split: str, readers: Readers | None = None) -> str:
    """The source of a split's rows for errors: its file, or the set."""
    files = files_read(path, readers)
    if file := files.get(split, files.get("train")):
        return file.name
    if isinstance(path, dict):
        return "the set"
    location = Path(resolve(path))
    return location.name if location.is_dir() else path


def doubled_columns(path: str | dict[str, str]) -> dict[str, list[str]]:
    """By split the names that are in its CSV's header twice: pandas names the second of them `name.1`."""
    by_split = {}
    for split, file in files_read(path).items():
        if READERS.get(_kind(file)) == "csv":
            with contextlib.suppress(UnicodeDecodeError):  # a caller's own reader knows another encoding
                names = next(csv_rows(file), [])
                by_split[split] = sorted({name for name in names if names.count(name) > 1})
    return {split: names for split, names in by_split.items() if names}


def check_names(
    names: Sequence[str], columns: Iterable[str | None], where: str, settings: Mapping[str, Any] | None = None
) -> None:
    """Raise for a column that is not among a table's names; `settings` have the options such as `label_column`."""
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
    if name := split_name(split):
        return name
    raise LoRAError(
        f"unknown split '{split}': expected train, validation, test or predict, of the last three also several, as"
        " validation_NAME"
    )


def _kind(path: Path) -> str:
    """A file's suffix without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
    return suffixes[-1] if suffixes else ""


def _by_split(named: Mapping[Any, Any], split_of: Callable[[str], str | None] = split_name) -> dict[str, Any]:
    """What is named by a split; two names of one split, such as `dev` and `val`, are refused: one would not be read."""
    seen: dict[str, str] = {}
    for name in map(str, named):
        split = split_of(name.split(".")[0])
        if split and seen.setdefault(split, name) != name:
            raise LoRAError(f"{seen[split]} and {name} are both the {split} set: name one file for each in data.path")
    return {split: named[name] for split, name in seen.items()}


def _read_file(path: Path, text_by: TextBy, readers: Readers, streaming: bool) -> Any:
    file, kind = str(path), _kind(path)
    _check_file(path)
    if path.suffix.lower() in readers:
        return readers[kind](file)
    if kind not in READERS:
        known = dict.fromkeys((*READERS, *readers))
        raise LoRAError(f"{file}: expected one of {', '.join(known)}, got '{kind or path.name}'")
    # pandas silently takes surplus fields on the left for an index in every row: of an unquoted `a, b` it keeps `b`.
    if READERS[kind] == "csv" and (fault := csv_fault(path, most=1)):
        raise LoRAError(f"{file}, {fault}")
    options: dict[str, Any] = {"csv": {"delimiter": delimiter_of(path)}, "text": {"sample_by": text_by}}
    files = {"train": glob.escape(file)}
    load = partial(datasets.load_dataset, READERS[kind], data_files=files, **options.get(READERS[kind], {}))
    if streaming:
        return load(streaming=True)["train"]
    try:
        table = load()["train"]
        if READERS[kind] == "json":
            table.data.table.validate(full=True)  # its reader accepts bytes that are no text, which fail later
    except Exception as error:  # datasets wraps each reader's errors
        cause = error.__cause__ or error
        cause = cause.__cause__ or cause
        if NO_ROWS in str(cause):
            raise LoRAError(f"{file} holds no rows") from error
        raise LoRAError(f"{file}, {fault_in(path, cause)}") from error
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


def _read_part(file: str, name: str | None, read: Callable[[Path], Any], streaming: bool) -> Any:
    """One split: a file, one table of `save_to_disk`, or `SET@PART` of the hub."""
    on_hub, _, part = file.partition("@")
    if part and not Path(file).exists():
        return _from_hub(on_hub, name, part, streaming)
    is_table = (Path(file) / "state.json").is_file()
    return _from_disk(Path(file), streaming)["train"] if is_table else read(Path(file))


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


UNCLOSED = re.compile(r"EOF inside string starting at row (\d+)")
WANTED = 'expected an object such as {"text": ...}'


def fault_in(path: Path, error: BaseException) -> str:
    """The reader's error in one line, with the row, counted from 1, where it can be found."""
    reader, reason = READERS[_kind(path)], " ".join(str(error).split()) or type(error).__name__
    if unclosed := UNCLOSED.search(reason):
        return f"row {unclosed[1]}: a quotation mark opens a text and none closes it"
    find = {"csv": csv_fault, "json": json_fault}.get(reader)
    return (find and find(path)) or f"cannot be read as {reader}: {reason}"


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, which may be compressed, as far as it can be decompressed."""
    with contextlib.suppress(OSError, EOFError), fsspec.open(str(path), "rb", compression="infer") as opened:
        yield from opened


def csv_rows(path: Path) -> Iterator[list[str]]:
    """The fields of a CSV's header and rows, as far as Python's reader understands them."""
    with contextlib.suppress(csv.Error):
        yield from csv.reader((line.decode("utf-8-sig") for line in _lines(path)), delimiter=delimiter_of(path))


def delimiter_of(path: Path) -> str:
    """What stands between the fields of a .csv or a .tsv."""
    return "\t" if _kind(path) == ".tsv" else ","


def csv_fault(path: Path, most: int | None = None) -> str | None:
    """The error of a CSV's first row (of at most `most`) that is not UTF-8 or has more fields than the header."""
    header, row, rows = list[str](), 0, csv_rows(path)
    try:
        header = next(rows, [])
        for row, fields in enumerate(islice(rows, most), 1):
            if len(fields) > len(header):
                advice = separator_advice(header) or f"a text with {delimiter_of(path)!r} in it stands in quotes"
                return f"row {row}: expected {len(header)} fields ({', '.join(header)}), got {len(fields)}; {advice}"
    except UnicodeDecodeError as error:
        return f"row {row + 1}: {_not_utf8(error)}" if header else f"its header is {_not_utf8(error)}"
    return None


def separator_advice(header: Sequence[str]) -> str:
    """Advice for a header of one field with another separator in it; else an empty text."""
    sign = next((sign for sign in (";", "\t", "|") if sign in header[0]), None) if len(header) == 1 else None
    advice = f"its cells seem to be separated by {sign!r}; a .csv is separated by commas, a .tsv by tabs"
    return advice if sign else ""


def json_fault(path: Path) -> str | None:
    """The error of the first row that is no object, in JSON Lines or in one array of all rows."""
    lines = (line for line in _lines(path) if line.strip())
    first = next(lines, b"")
    is_array = first.lstrip().startswith(b"[")
    for number, text in enumerate([first + b"".join(lines)] if is_array else chain([first], lines), 1):
        where = "" if is_array else f"row {number}: "
        try:
            value = json.loads(text)
        except UnicodeDecodeError as error:
            return f"{where}{_not_utf8(error)}"
        except json.JSONDecodeError as error:
            fault = error if is_array else f"{error.msg}: character {error.pos + 1}"
            return f"{where}{WANTED}, got what is not JSON ({fault})"
        for row, item in enumerate(value, 1) if is_array else [(number, value)]:
            if not isinstance(item, dict):
                return f"row {row}: {WANTED}, got {json.dumps(item)[:40]}"
    return None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x}): save the file as UTF-8"
