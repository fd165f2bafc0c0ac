"""What every DataModule over texts, or pairs of texts, with a target each has."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import datasets

from lora_lightning.data.io.rows import encode_rows
from lora_lightning.data.text.base import TextData


class TextPairData(TextData):
    """A `TextData` that gives token ids, attention masks and, but for prediction, `labels`.

    Args:
        path: as `TableData` takes it.
        tokenizer: a hub name, a directory or `package:NAME/path`.
        text_column: the text.
        text_pair_column: a second text, for sentence pairs.
        max_length: tokens per example at most; what is over is cut.
        table: arguments of `TableData` by name.
    """

    def __init__(
        self,
        path: str | dict[str, str],
        tokenizer: str,
        text_column: str = "text",
        text_pair_column: str | None = None,
        max_length: int = 128,
        **table: Any,
    ) -> None:
        super().__init__(path, tokenizer, max_length, **table)
        self.text_column, self.text_pair_column = text_column, text_pair_column

    @property
    @abstractmethod
    def target_columns(self) -> Sequence[str]:
        """Columns that the targets are read from."""

    @abstractmethod
    def targets(self, table: datasets.Dataset, split: str) -> list[Any]:
        """`labels` of each row."""

    def columns(self, split: str) -> Sequence[str | None]:
        return [self.text_column, self.text_pair_column, *([] if split == "predict" else self.target_columns)]

    def check(self, table: datasets.Dataset, split: str) -> None:
        self.check_texts(table, split, [self.text_column, self.text_pair_column])

    def encode(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        """Tokens, which are cached by the texts alone, and the targets beside them."""
        columns = (self.text_column, self.text_pair_column)
        options = {"tokenizer": self.tokenizer, "columns": columns, "max_length": self.max_length}
        tokens = self.encode_by(encode_rows, table, split, **options)
        return tokens if split == "predict" else tokens.add_column("labels", self.targets(table, split))

    def cut_share(self, split: str) -> float | None:
        def tokenized(rows: dict[str, Any]) -> Any:
            pairs = rows[self.text_pair_column] if self.text_pair_column else None
            return self.tokenizer(rows[self.text_column], pairs, verbose=False)

        return self.share_cut(split, tokenized)
