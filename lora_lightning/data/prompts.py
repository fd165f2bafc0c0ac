"""What a language model is asked to go on from, to see what it has learnt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


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
