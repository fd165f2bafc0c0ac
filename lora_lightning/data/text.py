"""Bases of DataModules over texts: a tokenizer, padding, pairs of texts with a target, prompts for a model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import datasets
import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from lora_lightning.backbones.tokenizers import load_tokenizer
from lora_lightning.data.base import TableData
from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.generation import PROMPT
from lora_lightning.tasks.losses.linear_cross_entropy import IGNORED


class TextData(TableData):
    """A `TableData` whose rows become token ids.

    Args:
        path: a file (CSV, TSV, JSONL, Parquet, also compressed), files by split, a directory, or a set on the hub;
            `package:NAME/path` is a file inside an installed package.
        tokenizer: a hub name, a directory, a GGUF file, or `package:NAME/path` for one of the latter.
        max_length: tokens per example at most; longer ones are cut.
        table: arguments of `TableData` by name.
    """

    least_length: int = 1
    """Tokens at least of `max_length`."""
    blank_inputs: bool = True
    """Whether an input may be blank."""

    def __init__(self, path: str | dict[str, str], tokenizer: str, *, max_length: int = 128, **table: Any) -> None:
        super().__init__(path, **table)
        if max_length < self.least_length:
            raise LoRAError(f"max_length must be at least {self.least_length}, got {max_length}")
        self.tokenizer_name, self.max_length = tokenizer, max_length

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        return load_tokenizer(self.tokenizer_name)

    @property
    def pad_token_id(self) -> int | None:
        """The id of the padding token."""
        return self.tokenizer.pad_token_id  # type: ignore[no-any-return]

    @property
    def padding_side(self) -> str:
        """The side on which rows are padded: the tokenizer's."""
        return str(self.tokenizer.padding_side)

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        return partial(self.collate_rows, pad_token_id=self.pad_token_id or 0, side=self.padding_side)

    def check(self, table: datasets.Dataset, split: str) -> None:
        self.check_texts(table, split, self.input_columns, blank=self.blank_inputs)

    @staticmethod
    def collate_rows(rows: list[dict[str, Any]], *, pad_token_id: int, side: str) -> dict[str, Any]:
        """Encoded rows to a batch."""
        return pad_batch(rows, pad_token_id=pad_token_id, side=side)


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
        self.input_columns = [text_column, text_pair_column]

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        if self.pad_token_id is None:  # a head finds a text's end by it
            raise LoRAError(f"the tokenizer '{self.tokenizer_name}' has neither a padding token nor an end token")
        return super().collate

    @abstractmethod
    def targets(self, table: datasets.Dataset, split: str) -> list[Any]:
        """The `labels` of each row."""

    def encode(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        """Encode tokens, which are cached by the texts alone, and add the targets."""
        columns = (self.text_column, self.text_pair_column)
        options = {"tokenizer": self.tokenizer, "columns": columns, "max_length": self.max_length}
        tokens = self.encode_by(encode_rows, table, split, **options)
        return tokens if split == "predict" else tokens.add_column("labels", self.targets(table, split))


def encode_rows(
    rows: dict[str, list[Any]], *, tokenizer: PreTrainedTokenizerBase, columns: tuple[str, str | None], max_length: int
) -> dict[str, Any]:
    """Token ids of a batch of texts, or of pairs of texts, and which of them were cut."""
    text, pair = columns
    tokens, cut = tokenize_cut(tokenizer, max_length, text=rows[text], text_pair=rows[pair] if pair else None)
    return {**tokens, "text_cut": cut}


def tokenize_cut(
    tokenizer: PreTrainedTokenizerBase, max_length: int | None, **texts: Any
) -> tuple[BatchEncoding, list[bool]]:
    """Tokenize texts, cut at `max_length` (None: the tokenizer's limit), and return which of them were cut."""
    tokens = tokenizer(**texts, truncation=True, max_length=max_length)
    if tokens.encodings is not None:
        return tokens, [bool(encoding.overflowing) for encoding in tokens.encodings]
    whole, limit = tokenizer(**texts, verbose=False), max_length or tokenizer.model_max_length
    return tokens, [len(ids) > limit for ids in whole["input_ids"]]


FILL = {"attention_mask": 0, "token_type_ids": 0, "labels": IGNORED, "word_ids": -1}
"""Padding values by name; `input_ids` get the padding token."""


def pad_batch(rows: Sequence[Mapping[str, Any]], *, pad_token_id: int, side: str = "right") -> dict[str, Any]:
    """Rows to a batch by name: lists of token ids become (n, t), single numbers (n,); lists of texts stay.

    `input_ids` get an `attention_mask`, except in packed rows, which have `position_ids`: there the padding is one more
    document, without labels. Entries whose names begin with `prompt_` are padded on the left, for generation.
    """
    fill, batch = {**FILL, "input_ids": pad_token_id}, dict[str, Any]()
    for name in rows[0]:
        values = [row[name] for row in rows]
        kind, mask = name.removeprefix(PROMPT), name.replace("input_ids", "attention_mask")
        where = side if kind == name else "left"
        if isinstance(values[0], int | float):
            batch[name] = torch.tensor(values)
        elif kind == "position_ids":
            longest = max(map(len, values))
            batch[name] = torch.tensor([[*ids, *range(longest - len(ids))] for ids in values])
        else:
            batch[name] = _pad(values, fill[kind], where) if kind in fill else values
        if kind == "input_ids" and not {mask, "position_ids"} & set(rows[0]):
            batch[mask] = _pad([[1] * len(ids) for ids in values], FILL["attention_mask"], where)
    return batch


def _pad(rows: list[list[int]], value: int, side: str) -> torch.Tensor:
    longest = max(map(len, rows))
    filling = [[value] * (longest - len(row)) for row in rows]
    pairs = zip(rows, filling, strict=True)
    return torch.tensor([[*row, *more] if side == "right" else [*more, *row] for row, more in pairs])


LONGEST = 32
"""Tokens at most of a prompt from the beginning of a text."""
SHOWN = 64
"""Tokens of its reference, the text that follows."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt from rows that are not trained on."""

    text: str
    """Its text."""
    input_ids: list[int]
    """Its token ids."""
    reference: str
    """The text that follows it in the set."""


class GivesPrompts(TextData):
    """A `TextData` with prompts for a language model."""

    padding_side = "right"

    @abstractmethod
    def prompt_of(self, row: dict[str, Any]) -> Prompt:
        """The prompt of a row."""

    def held_out_rows(self, count: int) -> Any:
        """At most `count` equally spaced rows of validation, else test, else train: of a sorted file some of all."""
        table = next(self.tables[name] for name in ("validation", "test", "train") if name in self.tables)
        return table.select(range(0, len(table), max(len(table) // count, 1))[:count])

    def prompts(self, count: int) -> list[Prompt]:
        """At most `count` prompts from held-out rows, the same each time."""
        return [self.prompt_of(row) for row in self.held_out_rows(count)]

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end the model's answer."""
        number = self.tokenizer.eos_token_id
        return [] if number is None else [int(number)]


def beginning_of(text: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """A prompt of a text's first half, or of its first `LONGEST` tokens."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    ids = ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
    half = max(min(len(ids) // 2, LONGEST), 1)
    shown = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:half], ids[half : half + SHOWN]))
    return Prompt(text=next(shown).strip(), input_ids=ids[:half], reference=next(shown).strip())
