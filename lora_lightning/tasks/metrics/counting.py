"""Counts the examples and the tokens of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

IDS, MASK = "input_ids", "attention_mask"


def examples_in(batch: Any) -> int:
    """The number of rows of the batch's first tensor; a packed row counts as one."""
    first = next(tensors_in(batch), None)
    return 0 if first is None else len(first) if first.dim() else 1


def tokens_in(batch: Any) -> Tensor | int | None:
    """The number of tokens that the backbone reads: ones of the attention mask, or all ids without a mask.

    A tensor if they are counted on the device; None if the batch has no text. Labels of encoder-decoders do not count.
    """
    if not isinstance(batch, Mapping):
        parts = [tokens_in(part) for part in batch] if isinstance(batch, list | tuple) else []
    else:
        parts = [tokens_in(part) for part in batch.values() if isinstance(part, Mapping | list | tuple)]
        for name, ids in batch.items():
            if isinstance(ids, Tensor) and name.endswith(IDS):
                mask = batch.get(f"{name.removesuffix(IDS)}{MASK}")
                parts.append(mask.sum() if isinstance(mask, Tensor) else ids.numel())
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """The tensors in mappings, lists and tuples at any depth."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from (t for part in batch.values() for t in tensors_in(part))
    elif isinstance(batch, list | tuple):
        yield from (t for part in batch for t in tensors_in(part))
