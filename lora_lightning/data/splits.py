"""Rows of a table into train, validation and test, the same each time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lora_lightning.lora.errors import LoRAError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How to split a set that has no splits of its own."""

    validation: float = 0.1
    """Share of the groups for validation."""
    test: float = 0.1
    """Share of the groups for test."""
    group_by: str | None = None
    """A column: rows that agree in it stay together, so that no film, author or patient is in two splits."""
    seed: int = 0
    """Of the shuffle."""

    def __post_init__(self) -> None:
        if not (0 <= self.validation < 1 and 0 <= self.test < 1 and self.validation + self.test < 1):
            raise LoRAError(
                f"shares of validation and test must be at least 0 and below 1 together, got {self.validation}"
                f" and {self.test}"
            )


def split_rows(groups: Sequence[object], config: SplitConfig) -> dict[str, list[int]]:
    """Row numbers per split, in the table's order. `groups` names each row's group.

    Raises:
        LoRAError: too few groups to give each split one.
    """
    names = sorted({str(group) for group in groups})
    random.Random(config.seed).shuffle(names)
    n_validation, n_test = round(len(names) * config.validation), round(len(names) * config.test)
    wanted = [config.validation > 0 and n_validation == 0, config.test > 0 and n_test == 0]
    if any(wanted) or len(names) - n_validation - n_test < 1:
        raise LoRAError(f"{len(names)} groups are too few to split {config.validation:g} and {config.test:g} off them")
    split_of = dict.fromkeys(names, "train")
    split_of |= dict.fromkeys(names[:n_test], "test")
    split_of |= dict.fromkeys(names[n_test : n_test + n_validation], "validation")
    rows: dict[str, list[int]] = {name: [] for name in SPLITS}
    for row, group in enumerate(groups):
        rows[split_of[str(group)]].append(row)
    return {name: numbers for name, numbers in rows.items() if numbers}
