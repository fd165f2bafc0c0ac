"""Several documents in one row, so that little of a batch is padding.

A row is a mapping with `input_ids` and `labels` of one length (-100 where nothing is trained on). Documents longer than
a row are cut into pieces, so that no token is lost. Where a document or piece begins, `position_ids` restart at 0 and
the label is -100: nothing in the row predicts it. A packed row, one with `position_ids`, is collated without an
attention mask; `tasks/packed.py` says what keeps its documents apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, compress
from typing import Any

import datasets
from lightning.pytorch.utilities import rank_zero_info

from lora_lightning.data.io.rows import lengths_of
from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.losses.token_loss import IGNORED

Rows = Mapping[str, Sequence[Any]]
"""A batch of rows as `datasets` hands it over: columns of lists of whole numbers."""

AT_ONCE = 10_000
"""Documents that are packed together. More fill rows a little better, and their order is kept less."""


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Which documents share a row, by best-fit decreasing: the longest first, each where it leaves the least room.

    Needs at most 11/9 of the fewest rows possible, and one (Johnson 1974); for texts as they come, hardly more.

    Args:
        lengths: of each document, 1 to `max_length`.
        max_length: of a row.

    Returns:
        The documents' numbers by row, in ascending order within a row, and rows by their first.

    Raises:
        LoRAError: a document that does not fit into a row.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # rows by how many tokens they have room for
    rooms = 0  # bit n is set where some row has room for n
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[document]
        if not 0 < length <= max_length:
            raise LoRAError(f"a document of {length} tokens does not go into rows of {max_length}: cut it first")
        enough = rooms >> length
        if enough:
            room = (enough & -enough).bit_length() - 1 + length  # the least that is enough
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = max_length, len(rows)
            rows.append([])
        rows[row].append(document)
        left = room - length
        if left:
            with_room[left].append(row)
            rooms |= 1 << left
    return sorted(sorted(row) for row in rows)


def cut(rows: Rows, *, max_length: int) -> dict[str, list[Any]]:
    """Rows longer than `max_length` in pieces, in order. For `table.map(batched=True)`.

    Columns of lists are cut alike, and those of single values say the same of each piece. The first label of each piece
    is -100.
    """
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
    """The same without pieces in which nothing is trained on, such as a last one of a single token."""
    return _drop_untrained(cut(rows, max_length=max_length))


def pack_rows(rows: Rows, *, max_length: int) -> dict[str, list[list[int]]]:
    """Rows `input_ids` and `labels`, cut and packed; `position_ids` are added. For `table.map(batched=True)`.

    A packed row in which nothing is trained on is left out.
    """
    pieces = cut({name: rows[name] for name in ("input_ids", "labels")}, max_length=max_length)
    lengths = [len(ids) for ids in pieces["input_ids"]]
    pieces["position_ids"] = [list(range(length)) for length in lengths]
    together = pack(lengths, max_length)
    return _drop_untrained(
        {name: [list(chain(*(column[i] for i in row))) for row in together] for name, column in pieces.items()}
    )


def _drop_untrained(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    kept = [any(label != IGNORED for label in labels) for labels in rows["labels"]]
    return {name: list(compress(column, kept)) for name, column in rows.items()}


def pack_table(table: datasets.Dataset, max_length: int, split: str) -> datasets.Dataset:
    """A table of `input_ids` and `labels` as packed rows, cached like every `map`; says how full they are."""
    # By one process: which documents are packed together, and so which rows there are, is not to hang on how many.
    options: dict[str, Any] = {"remove_columns": table.column_names, "fn_kwargs": {"max_length": max_length}}
    packed = table.map(pack_rows, batched=True, batch_size=AT_ONCE, desc=f"pack {split}", **options)
    empty = 1 - sum(lengths_of(packed)) / (max_length * len(packed))
    rank_zero_info(f"{split}: {len(table):,} documents in {len(packed):,} rows of {max_length:,}, {empty:.1%} empty")
    return packed
