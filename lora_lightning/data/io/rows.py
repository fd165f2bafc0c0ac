"""Reading of a table's values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow.compute

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
