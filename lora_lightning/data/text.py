"""Bases of DataModules over texts: a tokenizer, a maximal length, padding; and pairs of texts with a target."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import datasets
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from lora_lightning.backbones.tokenizers import load_tokenizer
from lora_lightning.data.base import TableData
from lora_lightning.data.io.rows import encode_rows
from lora_lightning.lora.errors import LoRAError


class TextData(TableData):
    """A `TableData` whose rows become token ids.

    Args:
        path: a file (CSV, TSV, JSONL, Parquet, also compressed), files by split, a directory, or a set on the hub;
            `package:NAME/path` is a file inside an installed package.
        tokenizer: a hub name, a directory, a GGUF file, or `package:NAME/path` for one of the latter.
        max_length: tokens per example at most; longer ones are cut.
        table: arguments of `TableData` by name.
    """

    def __init__(self, path: str | dict[str, str], tokenizer: str, *, max_length: int = 128, **table: Any) -> None:
        super().__init__(path, **table)
        if max_length < 1:
            raise LoRAError(f"max_length must be at least 1 token, got {max_length}")
        self.tokenizer_name, self.max_length = tokenizer, max_length
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_name)
        return self._tokenizer

    @property
    def pad_token_id(self) -> int | None:
        """The id of the padding token."""
        number = self.tokenizer.pad_token_id
        return None if number is None else int(number)

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        return DataCollatorWithPadding(self.tokenizer)


class TextPairData(TextData):
    """A `TextData` with token ids, attention masks and, except for prediction, `labels`.

    Args:
        text_column: the text.
        text_pair_column: a second text, for sentence pairs.
        texts: arguments of `TextData`.
    """

    def __init__(
        self, *texts: Any, text_column: str = "text", text_pair_column: str | None = None, **table: Any
    ) -> None:
        super().__init__(*texts, **table)
        self.text_column, self.text_pair_column = text_column, text_pair_column

    @property
    @abstractmethod
    def target_columns(self) -> Sequence[str]:
        """Columns of the targets."""

    @abstractmethod
    def targets(self, table: datasets.Dataset, split: str) -> list[Any]:
        """The `labels` of each row."""

    def columns(self, split: str) -> Sequence[str | None]:
        return [self.text_column, self.text_pair_column, *([] if split == "predict" else self.target_columns)]

    def check(self, table: datasets.Dataset, split: str) -> None:
        self.check_texts(table, split, [self.text_column, self.text_pair_column])

    def encode(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        """Encode tokens, which are cached by the texts alone, and add the targets."""
        columns = (self.text_column, self.text_pair_column)
        options = {"tokenizer": self.tokenizer, "columns": columns, "max_length": self.max_length}
        tokens = self.without_cuts(self.encode_by(encode_rows, table, split, **options), split)
        return tokens if split == "predict" else tokens.add_column("labels", self.targets(table, split))
