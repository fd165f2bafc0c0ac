"""What texts that become texts have in common: one or several targets to a source, and a greatest length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from lora_lightning.data.io.rows import ROW, cells_of, values_of
from lora_lightning.data.text.base import TextData


class TargetData(TextData):
    """A `TextData` whose rows hold a target, or a list of several: each makes an example with the row's source."""

    def check_targets(self, table: datasets.Dataset, split: str, column: str) -> None:
        """Raise where the column holds neither a text nor a list of at least one."""
        for row, value in cells_of(table, ROW, column):
            several = value if isinstance(value, list) else [value]
            if not several or not all(isinstance(text, str) for text in several):
                raise self.bad_cell(split, row, column, "text, or a list of texts", value)


def one_target_each(table: datasets.Dataset, column: str) -> datasets.Dataset:
    """The table with a row for each target where the column holds lists of them."""
    targets = list(values_of(table, column))
    if not any(isinstance(own, list) for own in targets):
        return table
    rows = [i for i, own in enumerate(targets) for _ in own]
    flat = [text for own in targets for text in own]
    return table.select(rows).remove_columns(column).add_column(column, flat)


def references_of(pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Of each pair of a source and a target all targets of its source, where it is the source's first; else none.

    So a model writes once for each source, and is held to all that people wrote for it.
    """
    first: dict[str, int] = {}
    references: list[list[str]] = [[] for _ in pairs]
    for row, (source, target) in enumerate(pairs):
        references[first.setdefault(source, row)].append(target)
    return references


def tokenize_up_to(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int, *, target: bool = False
) -> tuple[list[list[int]], list[bool]]:
    """Token ids of each text, cut where there are more than `max_length`, and which texts were cut."""

    def ids_of(texts: list[str], **cut: Any) -> list[list[int]]:
        given: dict[str, Any] = {"text_target" if target else "text": texts}
        return list(tokenizer(**given, **cut, verbose=False)["input_ids"])

    ids = ids_of(texts)
    long = [i for i, own in enumerate(ids) if len(own) > max_length]
    if long:
        for i, own in zip(long, ids_of([texts[i] for i in long], truncation=True, max_length=max_length), strict=True):
            ids[i] = own
    return ids, [i in set(long) for i in range(len(ids))]
