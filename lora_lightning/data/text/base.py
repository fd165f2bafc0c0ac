"""What every DataModule over texts has: a tokenizer, a greatest length and padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from lora_lightning.backbones.tokenizers import load_tokenizer
from lora_lightning.data.base import TableData
from lora_lightning.data.io.rows import lengths_of
from lora_lightning.lora.errors import LoRAError

SAMPLE = 1000
"""Texts of full length at most that are looked at again, to see how many of them were cut."""


class TextData(TableData):
    """A `TableData` whose rows become token ids.

    Args:
        path: as `TableData` takes it.
        tokenizer: a hub name, a directory or `package:NAME/path`.
        max_length: tokens per example at most.
        table: arguments of `TableData` by name.
    """

    def __init__(self, path: str | dict[str, str], tokenizer: str, max_length: int, **table: Any) -> None:
        super().__init__(path, **table)
        if max_length < 1:
            raise LoRAError(f"max_length must be at least 1 token, got {max_length}")
        self.tokenizer_name, self.max_length = tokenizer, max_length
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_name)
        return self._tokenizer

    @property
    def pad_token_id(self) -> int | None:
        """The number that fills short texts up."""
        number = self.tokenizer.pad_token_id
        return None if number is None else int(number)

    def share_cut(self, split: str, tokenized: Callable[[dict[str, Any]], Any]) -> float | None:
        """The share of texts that are longer than `max_length`.

        Args:
            split: which is encoded row by row.
            tokenized: rows as columns to what the tokenizer makes of them without a cut.
        """
        encoded, table = self._encoded.get(split), self.tables[split]
        if encoded is None or len(encoded) != len(table):
            return None
        full = np.flatnonzero(np.array(lengths_of(encoded)) >= self.max_length)
        if not len(full):
            return 0.0
        sample = full[:: -(-len(full) // SAMPLE)]
        whole = tokenized(table.select(sample)[:])["input_ids"]
        return len(full) / len(table) * sum(len(ids) > self.max_length for ids in whole) / len(sample)

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        return DataCollatorWithPadding(self.tokenizer)
