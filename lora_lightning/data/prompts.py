"""What a language model is asked to go on from, to see what it has learnt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt from rows that are not trained on."""

    text: str
    """As a person reads it."""
    input_ids: list[int]
    """As the model does."""
    reference: str
    """What follows it in the set."""
