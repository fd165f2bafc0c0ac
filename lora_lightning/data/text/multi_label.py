"""Texts, or pairs of texts, with any number of labels each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets

from lora_lightning.data.io.rows import ROW, cells_of, values_of
from lora_lightning.data.text.labels import LabelNames, numbers_of
from lora_lightning.data.text.text_pairs import TextPairData
from lora_lightning.lora.errors import LoRAError


class MultiLabelTextData(LabelNames, TextPairData):
    """Files or a Hugging Face set to batches of token ids, attention masks and `labels` (n, num_classes) of 0 and 1.

    Labels come in one of three forms: a column of lists, a column of texts such as `sport;politics`, or a column of 0
    and 1 for each label. A row may have none.

    Args:
        path: a file (CSV, TSV, JSONL, Parquet, also compressed), files by split, a directory, or a set on the hub;
            `package:NAME/path` is a file inside an installed package.
        tokenizer: a hub name, a directory or `package:NAME/path`.
        text_column: the text.
        text_pair_column: a second text, for sentence pairs.
        label_column: the labels, names or numbers, in a list or in one text.
        separator: what stands between labels in one text.
        label_columns: in place of `label_column`, a column of 0 and 1 for each label, whose name is the label's.
        label_names: names in the order of their numbers. By default the set's own, else the sorted values in train.
        max_length: tokens per example at most; what is over is cut.
        table: arguments of `TableData` by name.

    Raises:
        LoRAError: a missing file or column, an empty text, a cell that holds no labels, an unknown label.
    """

    def __init__(
        self,
        path: str | dict[str, str],
        tokenizer: str,
        text_column: str = "text",
        text_pair_column: str | None = None,
        label_column: str = "labels",
        separator: str = ";",
        label_columns: list[str] | None = None,
        label_names: list[str] | None = None,
        max_length: int = 128,
        **table: Any,
    ) -> None:
        super().__init__(path, tokenizer, text_column, text_pair_column, max_length, **table)
        if label_columns and label_names and list(label_names) != list(label_columns):
            raise LoRAError(f"label_columns name the labels, {label_columns}: leave label_names out, got {label_names}")
        if not separator:
            raise LoRAError("separator must be what stands between two labels, such as ';', got an empty text")
        self.label_column, self.separator, self.label_columns = label_column, separator, label_columns
        self.given_label_names = label_columns or label_names

    @property
    def target_columns(self) -> Sequence[str]:
        return self.label_columns or [self.label_column]

    def names_in_train(self) -> list[str]:
        feature = getattr(self.tables["train"].features[self.label_column], "feature", None)
        if isinstance(feature, datasets.ClassLabel):
            return list(feature.names)
        labels = {label for row in self._rows(self.tables["train"]) for label in row}
        return list(dict.fromkeys(map(str, sorted(labels, key=lambda label: (isinstance(label, str), label)))))

    def check(self, table: datasets.Dataset, split: str) -> None:
        super().check(table, split)
        if split == "predict":
            return
        for column in self.target_columns:
            for row, value in cells_of(table, ROW, column):
                if expected := self._fault(value):
                    raise self.bad_cell(split, row, column, expected, value)

    def targets(self, table: datasets.Dataset, split: str) -> list[list[float]]:
        """0 or 1 for each label.

        Raises:
            LoRAError: a label is none of the names, or a number that none of them has, with its row.
        """
        if self.label_columns:
            return [[float(flag) for flag in row] for row in cells_of(table, *self.label_columns)]
        rows = self._rows(table)
        feature = getattr(table.features[self.label_column], "feature", None)
        numbers = numbers_of(self.label_names, [label for row in rows for label in row], feature)
        targets = [[0.0] * self.num_classes for _ in rows]
        for row, labels, target in zip(table[ROW], rows, targets, strict=True):
            for label in labels:
                if str(label) not in numbers:
                    raise self.unknown_label(split, row, self.label_column, label, numbers)
                target[numbers[str(label)]] = 1.0
        return targets

    def _rows(self, table: datasets.Dataset) -> list[list[Any]]:
        return [self._apart(value) for value in values_of(table, self.label_column)]

    def _apart(self, value: list[Any] | str | int | None) -> list[Any]:
        """A cell's labels; an empty cell of a CSV is None, and one number in each of its cells makes them numbers."""
        if isinstance(value, list | int):
            return value if isinstance(value, list) else [value]
        return [part for text in (value or "").split(self.separator) if (part := text.strip())]

    def _fault(self, value: object) -> str | None:
        """What was expected where a cell holds something else."""
        if self.label_columns:
            return None if isinstance(value, int | float) and value in (0, 1) else "0 or 1"
        if value is None or isinstance(value, str | int):
            return None
        whole = isinstance(value, list) and all(isinstance(label, str | int) for label in value)
        return None if whole else f"a list of labels, or labels with '{self.separator}' between"
