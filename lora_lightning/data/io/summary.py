"""A summary of a set's rows before the first step, as plain data: counts and warnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, combinations
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from lora_lightning.data.io.tables import values_of
from lora_lightning.lora.errors import first_few

MOST_COMPARED = 200_000
"""Columns that are no texts, such as conversations, are compared up to so many rows, since each row must be read."""
FEW = 2
"""A warning names classes with fewer rows in train."""
MUCH = 0.05
"""From this share of cut texts on, there is a warning."""


def summarize(data: Any) -> dict[str, Any]:
    """Rows by split, labels with counts, the share of texts that are cut, and warnings, of a `TableData` after setup.

    `in_two_splits` is how many rows of a split are in another too, by `"test in train"`. Vectorized over Arrow: a
    million rows of texts take about a second.
    """
    inputs, targets = {}, {}
    for split, table in data.tables.items():
        read, written = data.text_columns(table, "predict" if split.startswith("predict") else split)
        inputs[split], targets[split] = _texts(table, read), _texts(table, written)
    summary: dict[str, Any] = {
        "rows": {split: len(table) for split, table in data.tables.items()},
        "labels": {split: counts for split in data.tables if (counts := data.label_counts(split))},
        "cut": {split: data.cut_shares[split] for split in data.tables if split in data.cut_shares},
        "in_two_splits": dict(_in_two(inputs)),
    }
    warnings = [_of_texts(data, inputs), _of_texts(data, targets), _of_splits(data, summary), _of_labels(summary)]
    return {**summary, "warnings": list(chain(*warnings))}


def _of_texts(data: Any, texts: dict[str, dict[str, Any]]) -> Iterator[str]:
    for split, columns in texts.items():
        for name, column in columns.items():
            if pa.types.is_large_binary(column.type):  # of conversations
                continue
            where = f"{data.place(split)}, column '{name}'"
            if blank := _count(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0)):
                yield f"{where}: {blank:,} {'text is' if blank == 1 else 'texts are'} blank: remove those rows"
            if broken := _count(pc.match_substring(column, "\0")):
                which = "text holds" if broken == 1 else "texts hold"
                yield f"{where}: {broken:,} {which} NUL bytes: save the file as UTF-8"


def _of_splits(data: Any, summary: dict[str, Any]) -> Iterator[str]:
    for split, names in data.doubled_columns.items():
        yield f"{data.place(split)}: the header has {first_few(names)} twice: the first is read; rename one"
    for which, count in summary["in_two_splits"].items():
        split, _, other = which.partition(" in ")
        tell = "set data.init_args.split.group_by to the column that tells them, or remove what is double"
        cure = "remove them there" if {split, other} <= data.given_splits else tell
        yield f"{count:,} of {summary['rows'][split]:,} rows of {split} stand in {other} too, which flatters: {cure}"
    for split, shares in summary["cut"].items():
        for what, share in shares.items():
            option = data.cut_by.get(what, "max_length")
            if share >= MUCH and option is not None:
                length = getattr(data, option, None)
                cure = f"at {length} tokens: raise data.init_args.{option}"
                cure = cure if length else "at the model's end: shorten them"
                yield f"{share:.0%} of the {what.removesuffix(' cut')} in {split} are cut {cure}"


def _of_labels(summary: dict[str, Any]) -> Iterator[str]:
    labels = summary["labels"].get("train", {})
    alike: dict[str, list[str]] = {}
    for name in labels:
        alike.setdefault(" ".join(name.split()).casefold(), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            shown = ", ".join(map(repr, names))
            yield f"the labels {shown} differ by case or blanks only and are {len(names)} classes: write them alike"
    if blank := [name for name in labels if not name.strip()]:
        yield f"{labels[blank[0]]:,} rows in train have the blank label {blank[0]!r}, a class: name it, or remove them"
    rare = [f"{name} ({count})" for name, count in labels.items() if count < FEW]
    if rare:
        yield f"fewer than {FEW} rows in train have the label {first_few(rare)}: add rows, or leave the label out"


def _texts(table: datasets.Dataset, names: Sequence[str]) -> dict[str, Any]:
    """These columns in Arrow, lists of words as one text each; columns of other types are left out."""
    columns = {}
    for name in names:
        if name not in table.column_names or isinstance(table.features[name], datasets.Image):
            continue
        column = table.select_columns([name]).with_format("arrow")[:][name]
        kind = column.type
        if pa.types.is_list(kind) and pa.types.is_string(kind.value_type):
            column = pc.binary_join(column, "\x1f").cast(pa.large_string())
        elif pa.types.is_list(kind) or pa.types.is_struct(kind):
            if len(table) > MOST_COMPARED:
                continue
            column = pa.chunked_array([pa.array(map(repr, values_of(table, name)), pa.large_binary())])
        elif not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
            continue
        columns[name] = column
    return columns


def _in_two(texts: dict[str, dict[str, Any]]) -> Iterator[tuple[str, int]]:
    """For each two splits, how many rows of the later one are in the earlier one too."""
    keys = {}
    for split, columns in texts.items():
        parts = [column.cast(pa.large_binary()) for column in columns.values()]
        if parts:
            whole = [part.combine_chunks() for part in parts]
            keys[split] = set(columns), pc.binary_join_element_wise(*whole, pa.scalar(b"\x1e", pa.large_binary()))
    for (first, (names, rows)), (second, (others, later)) in combinations(keys.items(), 2):
        if names == others and (count := _count(pc.is_in(later, value_set=rows.unique()))):
            yield f"{second} in {first}", count


def _count(mask: Any) -> int:
    return pc.sum(mask).as_py() or 0
