"""What a language model is asked to go on from, to see what it has learnt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import datasets
from transformers import PreTrainedTokenizerBase

LONGEST = 32
"""Tokens of a text that a model is asked to go on from, at most."""
SHOWN = 64
"""Tokens of what follows there."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt from rows that are not trained on."""

    text: str
    """As a person reads it."""
    input_ids: list[int]
    """As the model does."""
    reference: str
    """What follows it in the set."""


class GivesPrompts(ABC):
    """A DataModule whose rows can be asked of a language model."""

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What the prompts are tokenised with."""

    @abstractmethod
    def prompts(self, count: int) -> list[Prompt]:
        """Some that are not trained on, the same each time.

        Args:
            count: how many at most.
        """

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end what the model writes."""
        number = self.tokenizer.eos_token_id
        return [] if number is None else [int(number)]


def held_out_split(splits: Mapping[str, object]) -> str:
    """The split that prompts are from: validation, test where there is none, and train where there is no other."""
    return next(name for name in ("validation", "test", "train") if name in splits)


def rows_from_all_over(table: datasets.Dataset, count: int) -> datasets.Dataset:
    """At most `count` rows at like distances, so that a file in order of topics gives some of each."""
    step = max(len(table) // count, 1)
    return table.select(range(0, len(table), step)[:count])


def beginning_of(text: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """A text's first half, or its first `LONGEST` tokens, to go on from."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    ids = ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
    half = max(min(len(ids) // 2, LONGEST), 1)
    shown = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:half], ids[half : half + SHOWN]))
    return Prompt(text=next(shown).strip(), input_ids=ids[:half], reference=next(shown).strip())
