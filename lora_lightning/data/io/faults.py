"""Finds the row at which a file is broken, since readers of tables seldom name it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from typing import Any

import fsspec

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
