"""What every DataModule over texts has: a tokenizer, a greatest length and padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from lora_lightning.data.base import TableData
from lora_lightning.data.text.tokenizers import load_tokenizer
from lora_lightning.lora.errors import LoRAError


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

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        return DataCollatorWithPadding(self.tokenizer)
