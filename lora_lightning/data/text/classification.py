"""Texts, or pairs of texts, with one label each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets

from lora_lightning.data.io.rows import values_of
from lora_lightning.data.text.labels import OneLabel
from lora_lightning.data.text.text_pairs import TextPairData
from lora_lightning.lora.errors import LoRAError, did_you_mean


class TextClassificationData(OneLabel, TextPairData):
    """Files or a Hugging Face set to batches of token ids, attention masks and label numbers.

    Args:
        path: a file (CSV, TSV, JSONL, Parquet, also compressed), files by split, a directory, or a set on the hub;
            `package:NAME/path` is a file inside an installed package.
        tokenizer: a hub name, a directory or `package:NAME/path`.
        text_column: the text.
        text_pair_column: a second text, for sentence pairs.
        label_column: the label, a name or a number.
        label_names: names in the order of their numbers. By default the set's own, else the sorted values in train.
        drop_labels: rows with these labels are left out.
        drop_duplicates: keep the first of rows with the same text.
        min_words: leave out shorter texts.
        max_length: tokens per example at most; what is over is cut.
        table: arguments of `TableData` by name.

    Raises:
        LoRAError: a missing file or column, an empty text or label, a label that training never saw.
    """

    def __init__(
        self,
        path: str | dict[str, str],
        tokenizer: str,
        text_column: str = "text",
        text_pair_column: str | None = None,
        label_column: str = "label",
        label_names: list[str] | None = None,
        drop_labels: list[str] | None = None,
        drop_duplicates: bool = False,
        min_words: int = 0,
        max_length: int = 128,
        **table: Any,
    ) -> None:
        super().__init__(path, tokenizer, text_column, text_pair_column, max_length, **table)
        self.label_column, self.given_label_names = label_column, label_names
        self.drop_labels, self.drop_duplicates, self.min_words = set(drop_labels or ()), drop_duplicates, min_words

    @property
    def target_columns(self) -> Sequence[str]:
        return [self.label_column]

    def targets(self, table: datasets.Dataset, split: str) -> list[int]:
        return self.label_numbers(table, split)

    def check(self, table: datasets.Dataset, split: str) -> None:
        """Raise at a value of a row that is not dropped anyway."""
        labels = values_of(table, self.label_column) if split != "predict" else ()
        dropped = [str(label) in self.drop_labels for label in labels]
        self.check_texts(table, split, [self.text_column, self.text_pair_column], dropped)
        if split != "predict":
            self.check_labels(table, split)

    def filter(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        if split == "predict":
            return table
        labels = [str(value) for value in values_of(table, self.label_column)]
        missing = self.drop_labels - set(labels)
        if split == "train" and missing:
            unknown = min(missing)
            raise LoRAError(f"drop_labels: no row is labelled '{unknown}'{did_you_mean(unknown, labels)}")
        seen: set[tuple[str, str | None]] = set()
        rows = []
        pairs = values_of(table, self.text_pair_column) if self.text_pair_column else [None] * len(table)
        for row, (text, pair, label) in enumerate(zip(values_of(table, self.text_column), pairs, labels, strict=True)):
            if label in self.drop_labels or len(text.split()) < self.min_words:
                continue
            if self.drop_duplicates and (text, pair) in seen:
                continue
            seen.add((text, pair))
            rows.append(row)
        if not rows:
            raise LoRAError(f"no row of the {split} set is left after drop_labels, drop_duplicates and min_words")
        return table if len(rows) == len(table) else table.select(rows)
