"""Pads rows of token ids of different lengths to one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_lightning.tasks.generation import PROMPT
from lora_lightning.tasks.losses.token_loss import IGNORED

FILL = {"attention_mask": 0, "token_type_ids": 0, "labels": IGNORED, "word_ids": -1}
"""Padding values by name; `input_ids` get the padding token."""


def pad_batch(rows: Sequence[Mapping[str, Any]], *, pad_token_id: int, side: str = "right") -> dict[str, Any]:
    """Rows to a batch by name: lists of token ids become (n, t), single numbers (n,); lists of texts stay.

    `input_ids` get an `attention_mask`, except in packed rows, which have `position_ids`: there the padding is one more
    document, without labels. Entries whose names begin with `prompt_` are padded on the left, for generation.
    """
    batch: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        prompt, kind = name.startswith(PROMPT), name.removeprefix(PROMPT)
        where = "left" if prompt else side
        mask = f"{PROMPT if prompt else ''}attention_mask"
        if isinstance(values[0], int | float):
            batch[name] = torch.tensor(values)
        elif kind == "input_ids":
            batch[name] = _pad(values, pad_token_id, where)
            if mask not in rows[0] and "position_ids" not in rows[0]:
                batch[mask] = _pad([[1] * len(ids) for ids in values], FILL["attention_mask"], where)
        elif kind in FILL:
            batch[name] = _pad(values, FILL[kind], where)
        elif kind == "position_ids":
            longest = max(map(len, values))
            batch[name] = torch.tensor([[*ids, *range(longest - len(ids))] for ids in values])
        else:
            batch[name] = values
    return batch


def _pad(rows: list[list[int]], value: int, side: str) -> torch.Tensor:
    longest = max(map(len, rows))
    filling = [[value] * (longest - len(row)) for row in rows]
    pairs = zip(rows, filling, strict=True)
    return torch.tensor([[*row, *more] if side == "right" else [*more, *row] for row, more in pairs])
