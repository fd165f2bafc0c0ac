"""Texts, or pairs of texts, with one label each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets

from lora_lightning.data.rows import ROW, check_order, encode_rows, without_hidden_labels
from lora_lightning.data.splits import SplitConfig
from lora_lightning.data.texts import TextData
from lora_lightning.lora.errors import LoRAError, did_you_mean


class TextClassificationData(TextData):
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
        name: which configuration of a hub set.
        split: how to split off validation and test where the set has none.
        batch_size: examples per batch and process in training.
        eval_batch_size: the same in evaluation; `batch_size` by default.
        length_grouped: put texts of like length into one batch, which pads less.
        num_workers: processes that prepare batches.
        num_proc: processes that tokenise, once, before training; none beside this one by default.
        seed: of the order in training.

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
        name: str | None = None,
        split: SplitConfig = SplitConfig(),  # noqa: B008  (frozen)
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        length_grouped: bool = True,
        num_workers: int = 0,
        num_proc: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            path,
            tokenizer,
            max_length,
            name=name,
            split=split,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            length_grouped=length_grouped,
            num_workers=num_workers,
            num_proc=num_proc,
            seed=seed,
        )
        self.text_column, self.text_pair_column, self.label_column = text_column, text_pair_column, label_column
        self.given_label_names = label_names
        self.drop_labels, self.drop_duplicates, self.min_words = set(drop_labels or ()), drop_duplicates, min_words
        self._label_names: list[str] | None = None

    def read(self) -> dict[str, datasets.Dataset]:
        tables = super().read()
        if "train" not in tables and not (self.given_label_names and "predict" in tables):
            raise LoRAError(
                f"the set has no train split, only {', '.join(tables)}: labels are read off train; to predict"
                " without it, give label_names"
            )
        return without_hidden_labels(tables, self.label_column)

    def columns(self, split: str) -> Sequence[str | None]:
        return [self.text_column, self.text_pair_column, None if split == "predict" else self.label_column]

    def check(self, table: datasets.Dataset, split: str) -> None:
        """Raise at a value of a row that is not dropped anyway."""
        labels = table[self.label_column] if split != "predict" else []
        dropped = [str(label) in self.drop_labels for label in labels]
        self.check_texts(table, split, [self.text_column, self.text_pair_column], dropped)
        for row, label in zip(table[ROW], labels, strict=False):
            if label is None:
                raise self.bad_cell(split, row, self.label_column, "a label", label)

    def filter(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        if split == "predict":
            return table
        labels = [str(value) for value in table[self.label_column]]
        missing = self.drop_labels - set(labels)
        if split == "train" and missing:
            unknown = min(missing)
            raise LoRAError(f"drop_labels: no row is labelled '{unknown}'{did_you_mean(unknown, labels)}")
        seen: set[tuple[str, str | None]] = set()
        rows = []
        pairs = table[self.text_pair_column] if self.text_pair_column else [None] * len(table)
        for row, (text, pair, label) in enumerate(zip(table[self.text_column], pairs, labels, strict=True)):
            if label in self.drop_labels or len(text.split()) < self.min_words:
                continue
            if self.drop_duplicates and (text, pair) in seen:
                continue
            seen.add((text, pair))
            rows.append(row)
        if not rows:
            raise LoRAError(f"no row of the {split} set is left after drop_labels, drop_duplicates and min_words")
        return table if len(rows) == len(table) else table.select(rows)

    @property
    def label_names(self) -> list[str]:
        """Names of the labels, in the order of their numbers."""
        if self._label_names is None:
            train = self.tables.get("train")
            feature = train.features[self.label_column] if train is not None else None
            if self.given_label_names:
                self._label_names = list(self.given_label_names)
                check_order(self._label_names, feature)
            elif isinstance(feature, datasets.ClassLabel):
                self._label_names = list(feature.names)
            else:
                self._label_names = [str(v) for v in sorted(set(self.tables["train"][self.label_column]))]
        return self._label_names

    def read_off_train(self) -> dict[str, Any]:
        return {"label_names": self.label_names}

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return len(self.label_names)

    def majority_share(self, split: str) -> float:
        """Accuracy on `split` of always saying the label that is most common in train."""
        train = list(self.encoded("train")["labels"])
        most_common = max(set(train), key=train.count)
        labels = list(self.encoded(split)["labels"])
        return labels.count(most_common) / len(labels)

    def encode(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        return self.encode_by(
            encode_rows,
            table,
            split,
            tokenizer=self.tokenizer,
            columns=(self.text_column, self.text_pair_column, self.label_column),
            numbers=None if split == "predict" else self._numbers(table, split),
            max_length=self.max_length,
        )

    def _numbers(self, table: datasets.Dataset, split: str) -> dict[str, int]:
        """The number of each label as it stands in the table, by its text.

        Raises:
            LoRAError: a label of this split is not among them, with its row.
        """
        numbers = {name: i for i, name in enumerate(self.label_names)}
        values = table[self.label_column]
        if all(isinstance(value, int) for value in values) and not numbers.keys() >= {str(v) for v in values}:
            numbers = {str(i): i for i in range(self.num_classes)}
        for row, label in enumerate(values):
            if str(label) not in numbers:
                near = did_you_mean(str(label), self.label_names)
                expected = f"one of the labels {', '.join(self.label_names[:10])}"
                raise self.bad_cell(split, table[ROW][row], self.label_column, expected, label, near)
        return numbers
