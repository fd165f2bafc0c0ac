"""Prompts from held-out rows for a language model to continue."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import datasets
from transformers import PreTrainedTokenizerBase

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


class GivesPrompts(ABC):
    """A DataModule with prompts for a language model."""

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the prompts."""

    @abstractmethod
    def prompts(self, count: int) -> list[Prompt]:
        """Prompts from held-out rows, the same each time.

        Args:
            count: how many at most.
        """

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end the model's answer."""
        number = self.tokenizer.eos_token_id
        return [] if number is None else [int(number)]


def held_out_split(splits: Mapping[str, object]) -> str:
    """The split of the prompts: validation, else test, else train."""
    return next(name for name in ("validation", "test", "train") if name in splits)


def rows_from_all_over(table: datasets.Dataset, count: int) -> datasets.Dataset:
    """At most `count` equally spaced rows, so that a file sorted by topic gives some of each."""
    step = max(len(table) // count, 1)
    return table.select(range(0, len(table), step)[:count])


def beginning_of(text: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """A prompt of a text's first half, or of its first `LONGEST` tokens."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    ids = ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
    half = max(min(len(ids) // 2, LONGEST), 1)
    shown = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:half], ids[half : half + SHOWN]))
    return Prompt(text=next(shown).strip(), input_ids=ids[:half], reference=next(shown).strip())
