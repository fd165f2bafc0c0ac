"""Texts, or pairs of texts, with one number each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets

from lora_lightning.data.io.rows import ROW, cells_of
from lora_lightning.data.text.labels import without_hidden_labels
from lora_lightning.data.text.text_pairs import TextPairData


class TextRegressionData(TextPairData):
    """Files or a Hugging Face set to batches of token ids, attention masks and numbers.

    Args:
        path: a file (CSV, TSV, JSONL, Parquet, also compressed), files by split, a directory, or a set on the hub;
            `package:NAME/path` is a file inside an installed package.
        tokenizer: a hub name, a directory or `package:NAME/path`.
        text_column: the text.
        text_pair_column: a second text, for sentence pairs.
        number_column: the number, in whatever unit it is to be predicted in.
        max_length: tokens per example at most; what is over is cut.
        table: arguments of `TableData` by name.

    Raises:
        LoRAError: a missing file or column, an empty text, a number that is missing, no number or not finite.
    """

    num_classes = 1
    """Outputs of the head."""

    def __init__(
        self,
        path: str | dict[str, str],
        tokenizer: str,
        text_column: str = "text",
        text_pair_column: str | None = None,
        number_column: str = "label",
        max_length: int = 128,
        **table: Any,
    ) -> None:
        super().__init__(path, tokenizer, text_column, text_pair_column, max_length, **table)
        self.number_column = number_column

    def read(self) -> dict[str, datasets.Dataset]:
        return without_hidden_labels(super().read(), self.number_column)

    @property
    def label_names(self) -> list[str]:
        """What the head's one output is: one name makes a head of one output, by the link that names classes."""
        return [self.number_column]

    @property
    def target_columns(self) -> Sequence[str]:
        return [self.number_column]

    def check(self, table: datasets.Dataset, split: str) -> None:
        super().check(table, split)
        if split == "predict":
            return
        for row, value in cells_of(table, ROW, self.number_column):
            number = number_in(value)
            if number is None or not math.isfinite(number):
                raise self.bad_cell(split, row, self.number_column, "a finite number", value)

    def targets(self, table: datasets.Dataset, split: str) -> list[float]:
        return [number for value in table[self.number_column] if (number := number_in(value)) is not None]


def number_in(value: object) -> float | None:
    """The number that a cell holds, None where it holds none. One stray word makes a CSV's whole column text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
