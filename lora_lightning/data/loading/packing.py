"""Packs several documents into one row, so that a batch has little padding.

A row is a mapping with `input_ids` and `labels` of one length (-100 where nothing is trained on). Documents longer than
a row are cut into pieces, so that no token is lost. At the beginning of a document or piece `position_ids` restart at 0
and the label is -100: nothing in the row predicts it. A packed row, one with `position_ids`, is collated without an
attention mask; `tasks/positions.py` says how its documents are kept apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, compress
from typing import Any

import datasets
from lightning.pytorch.utilities import rank_zero_info

from lora_lightning.data.io.tables import lengths_of
from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.losses.linear_cross_entropy import IGNORED

Rows = Mapping[str, Sequence[Any]]
"""A batch of rows of `datasets`: columns of lists of integers."""

AT_ONCE = 10_000
"""Documents that are packed together. More documents fill rows a little better, but change the order more."""


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Assign documents to rows by best-fit decreasing: the longest first, each where it leaves the least room.

    Needs at most 11/9 of the fewest possible rows, plus one (Johnson 1974); for typical texts hardly more.

    Returns:
        The documents' numbers by row, in ascending order within a row, and rows by their first.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # rows by their room in tokens
    rooms = 0  # bit n is set if some row has room for exactly n
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[document]
        if not 0 < length <= max_length:
            raise LoRAError(f"a document of {length} tokens does not go into rows of {max_length}: cut it first")
        enough = rooms >> length
        if enough:
            room = (enough & -enough).bit_length() - 1 + length  # the least sufficient room
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = max_length, len(rows)
            rows.append([])
        rows[row].append(document)
        remaining = room - length
        if remaining:
            with_room[remaining].append(row)
            rooms |= 1 << remaining
    return sorted(sorted(row) for row in rows)


def cut(rows: Rows, *, max_length: int) -> dict[str, list[Any]]:
    """Cut rows into pieces of `max_length`, single values repeated for each, the first label of each -100."""
    starts = [range(0, len(ids), max_length) for ids in rows["input_ids"]]
    pieces = {
        name: [
            list(value[i : i + max_length]) if isinstance(value, list) else value
            for value, row in zip(column, starts, strict=True)
            for i in row
        ]
        for name, column in rows.items()
    }
    pieces["labels"] = [[IGNORED, *labels[1:]] for labels in pieces["labels"]]
    return pieces


def cut_to_train(rows: Rows, *, max_length: int) -> dict[str, list[Any]]:
    """The same without pieces that have nothing to train on, such as a last one of a single token."""
    return _drop_untrained(cut(rows, max_length=max_length))


def pack_rows(rows: Rows, *, max_length: int) -> dict[str, list[list[int]]]:
    """Cut and pack rows of `input_ids` and `labels`, and add `position_ids`; without rows with nothing to train on."""
    pieces = cut({name: rows[name] for name in ("input_ids", "labels")}, max_length=max_length)
    lengths = [len(ids) for ids in pieces["input_ids"]]
    pieces["position_ids"] = [list(range(length)) for length in lengths]
    together = pack(lengths, max_length)
    return _drop_untrained(
        {name: [list(chain(*(column[i] for i in row))) for row in together] for name, column in pieces.items()}
    )


def _drop_untrained(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    trainable = [any(label != IGNORED for label in labels) for labels in rows["labels"]]
    return {name: list(compress(column, trainable)) for name, column in rows.items()}


def pack_table(table: datasets.Dataset, max_length: int, split: str) -> datasets.Dataset:
    """Pack a table of `input_ids` and `labels`, cached like every `map`, and log how full the rows are."""
    # In one process: the rows must not depend on the number of processes.
    options: dict[str, Any] = {"remove_columns": table.column_names, "fn_kwargs": {"max_length": max_length}}
    packed = table.map(pack_rows, batched=True, batch_size=AT_ONCE, desc=f"pack {split}", **options)
    empty = 1 - sum(lengths_of(packed)) / (max_length * len(packed))
    rank_zero_info(f"{split}: {len(table):,} documents in {len(packed):,} rows of {max_length:,}, {empty:.1%} empty")
    return packed
