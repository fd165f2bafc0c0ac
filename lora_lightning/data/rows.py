"""Rows of a table of texts on their way to token ids and label numbers."""

from __future__ import annotations

from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from lora_lightning.data.splits import SPLITS
from lora_lightning.lora.errors import LoRAError

ROW = "__row__"
"""A column that keeps each example's row in its file, counted from 1, so that an error can name it."""


def encode_rows(
    rows: dict[str, list[Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str, str | None, str],
    numbers: dict[str, int] | None,
    max_length: int,
) -> dict[str, Any]:
    """Token ids and label numbers of a batch of rows; no labels where `numbers` is None."""
    text, pair, label = columns
    pairs = rows[pair] if pair else None
    encoded = dict(tokenizer(rows[text], pairs, truncation=True, max_length=max_length))
    if numbers is not None:
        encoded["labels"] = [numbers[str(value)] for value in rows[label]]
    return encoded


def without_hidden_labels(tables: dict[str, datasets.Dataset], label_column: str) -> dict[str, datasets.Dataset]:
    """Splits that a run can use: hub sets hide the labels of a split by -1, and bring splits of other names."""
    used: dict[str, datasets.Dataset] = {}
    for split, table in tables.items():
        if split not in (*SPLITS, "predict"):
            continue
        hidden = split != "train" and label_column in table.column_names and set(table[label_column]) == {-1}
        if not hidden:
            used[split] = table
        elif "predict" not in tables:
            used["predict"] = table
    return used


def with_row_numbers(table: datasets.Dataset) -> datasets.Dataset:
    """The table with each row's number in the column `ROW`."""
    return table if ROW in table.column_names else table.add_column(ROW, list(range(1, len(table) + 1)))


def check_order(given: list[str], feature: Any) -> None:
    """Raise where given names are the set's own in another order: that would rename the classes."""
    if isinstance(feature, datasets.ClassLabel) and sorted(given) == sorted(feature.names) and given != feature.names:
        raise LoRAError(f"label_names must be in the set's own order, {feature.names}, got {given}")
