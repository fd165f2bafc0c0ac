"""Splits of a table into train, validation and test, the same each time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lora_lightning.lora.errors import LoRAError

SPLITS = ("train", "validation", "test")
CALLED = {**dict.fromkeys(("val", "valid", "dev"), "validation"), "predict": "predict"} | {s: s for s in SPLITS}
"""Splits by their names in files and sets."""


def split_name(name: str) -> str | None:
    """The split with this name; None where it is none.

    `dev_matched` is `validation_matched`, one of several validation sets; there may be several sets for test and
    predict too, but only one for train.
    """
    first, _, rest = name.partition("_")
    split = CALLED.get(first)
    if split is None or (rest and split == "train"):
        return None
    return f"{split}_{rest}" if rest else split


def kind_of(split: str) -> str:
    """The kind of a set: `validation` of `validation_mismatched`."""
    return split.partition("_")[0]


def rename_first_sets(names: Sequence[str]) -> dict[str, str]:
    """New names of sets by old: without a set named just `validation`, the first of its named sets gets that name."""
    renamed: dict[str, str] = {}
    for split in ("validation", "test", "predict"):
        further = [name for name in names if name.startswith(f"{split}_")]
        if further and split not in names:
            renamed[further[0]] = split
    return renamed


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How to split a set without splits."""

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
    """Row numbers by split, in the table's order, from each row's group; too few groups are refused."""
    names = sorted({str(group) for group in groups})
    random.Random(config.seed).shuffle(names)
    n_validation, n_test = round(len(names) * config.validation), round(len(names) * config.test)
    wanted = [config.validation > 0 and n_validation == 0, config.test > 0 and n_test == 0]
    if any(wanted) or len(names) - n_validation - n_test < 1:
        what = f"groups by '{config.group_by}'" if config.group_by else "rows"
        raise LoRAError(
            f"{len(names)} {what} are too few to split {config.validation:g} of them off for validation and"
            f" {config.test:g} for test: give more, other shares by split, or a file for each"
        )
    split_of = dict.fromkeys(names, "train")
    split_of |= dict.fromkeys(names[:n_test], "test")
    split_of |= dict.fromkeys(names[n_test : n_test + n_validation], "validation")
    rows: dict[str, list[int]] = {name: [] for name in SPLITS}
    for row, group in enumerate(groups):
        rows[split_of[str(group)]].append(row)
    return {name: numbers for name, numbers in rows.items() if numbers}
