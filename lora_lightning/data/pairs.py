"""Pairs of texts that match: a question and its answer, a title and its text, two sentences of one meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from lora_lightning.data.io.tables import ROW, cells_of, values_of
from lora_lightning.data.text import TextData, pad_batch, tokenize_cut

GROUP = "__group__"
PARTS = ("anchor", "positive", "negative")


class PairData(TextData):
    """Rows of an anchor, its positive and, if there is one, a hard negative, to batches of token ids for each of them.

    Rows with the same positive, or rows that agree in `group_column`, form a group, and are not used as each other's
    negatives.

    Args:
        anchor_column: the query. A file to predict on needs it alone.
        positive_column: the text that matches the anchor.
        negative_column: a hard negative: a similar text that does not match.
        group_column: rows that agree in it belong together.
        anchor_prefix: put before each anchor, as E5 has `query: `.
        positive_prefix: put before each positive and negative, as E5 has `passage: `.
        texts: arguments of `TextData`. A larger `batch_size` gives more negatives.
    """

    blank_inputs = False

    def __init__(
        self,
        *texts: Any,
        anchor_column: str = "anchor",
        positive_column: str = "positive",
        negative_column: str | None = None,
        group_column: str | None = None,
        anchor_prefix: str = "",
        positive_prefix: str = "",
        **table: Any,
    ) -> None:
        super().__init__(*texts, **table)
        self.anchor_column, self.positive_column, self.negative_column = anchor_column, positive_column, negative_column
        self.group_column = group_column
        self.input_columns, self.target_columns = [anchor_column], [positive_column, negative_column, group_column]
        self.anchor_prefix, self.positive_prefix = anchor_prefix, positive_prefix

    def check_targets(self, table: datasets.Dataset, split: str) -> None:
        """Raise for a text that is none or is blank, and for a negative that equals the positive."""
        self.check_texts(table, split, self.target_columns[:2], blank=False)
        if self.negative_column is not None:
            for row, positive, negative in cells_of(table, ROW, self.positive_column, self.negative_column):
                if positive == negative:
                    raise self.bad_cell(split, row, self.negative_column, "another text than the positive", negative)

    def encode(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        prefixes = (self.anchor_prefix, self.positive_prefix, self.positive_prefix)
        parts = list(zip(PARTS, self.columns(split), prefixes, strict=False))
        options = {"tokenizer": self.tokenizer, "max_length": self.max_length}
        encoded = self.encode_by(encode_texts, table, split, parts=parts, **options)
        if split == "predict":
            return encoded
        negatives, named = (c and list(values_of(table, c)) for c in (self.negative_column, self.group_column))
        groups = groups_of(list(values_of(table, self.positive_column)), negatives, named)
        return encoded.add_column(GROUP, groups)

    def lengths(self, table: datasets.Dataset) -> list[int]:
        """The total number of tokens of a row's texts."""
        parts = [name for name in PARTS if name in table.column_names]
        return [sum(map(len, texts)) for texts in cells_of(table, *parts)]

    @staticmethod
    def collate_rows(rows: list[dict[str, Any]], **padding: Any) -> dict[str, Any]:
        """The encoder's arguments (n, t) of each part, and the groups as `labels` (n, 1 or 2)."""
        parts = [name for name in PARTS if name in rows[0]]
        batch: dict[str, Any] = {n: pad_batch([{"input_ids": row[n]} for row in rows], **padding) for n in parts}
        return batch | ({"labels": torch.tensor([row[GROUP] for row in rows])} if GROUP in rows[0] else {})


def encode_texts(
    rows: dict[str, list[Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[tuple[str, str | None, str]],
    max_length: int,
) -> dict[str, Any]:
    """Token ids of each part by its name, column and prefix, and which of them were cut."""
    out: dict[str, Any] = {}
    for name, column, prefix in parts:
        if column is not None:
            texts = [prefix + text for text in rows[column]]
            tokens, out[f"{name}_cut"] = tokenize_cut(tokenizer, max_length, text=texts)
            out[name] = tokens["input_ids"]
    return out


def groups_of(
    positives: Sequence[str], negatives: Sequence[str] | None, named: Sequence[object] | None = None
) -> list[list[int]]:
    """The group numbers of each row's positive and negative: equal for equal texts, or for equal group columns.

    With a group column a negative's group is unknown: -1, as is that of a row whose cell is blank.
    """
    numbers: dict[str, int] = {}

    def number(value: object) -> int:
        return numbers.setdefault(str(value), len(numbers))

    if named is not None:
        groups = [-1 if name is None else number(name) for name in named]
        return [[group] if negatives is None else [group, -1] for group in groups]
    if negatives is None:
        return [[number(text)] for text in positives]
    return [[number(p), number(n)] for p, n in zip(positives, negatives, strict=True)]
