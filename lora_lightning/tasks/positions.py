"""How long a row a model can be given, where it has learnt an embedding for each position."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_lightning.lora.errors import LoRAError

OF_POSITIONS = re.compile(r"pos|wpe")
"""In the last part of the name of an embedding of positions."""

_FOUND: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


def refuse_too_long(backbone: nn.Module, batch: Any) -> None:
    """Raise where a row goes beyond the model's last position: an IndexError, and on a GPU the end of the process.

    Args:
        backbone: of which transformers' models alone say how many positions they know.
        batch: any; looked at are `input_ids` (b, t) in it and in mappings within, with `position_ids` where several
            documents share a row.
    """
    limit = learned_positions(backbone)
    if limit is None:
        return
    for inputs in _mappings(batch):
        ids, positions = inputs.get("input_ids"), inputs.get("position_ids")
        if not isinstance(ids, Tensor) or ids.dim() < 2 or ids.shape[-1] <= limit:
            continue
        longest = ids.shape[-1] if positions is None else int(positions.max()) + 1
        if longest > limit:
            raise LoRAError(_too_long(f"a row of {longest} tokens is", limit, backbone))


def refuse_long_rows(backbone: nn.Module, datamodule: Any) -> None:
    """The same of all rows that a DataModule has encoded, before the first batch is made of them.

    Raises:
        LoRAError: a split has rows that are too long, with their number.
    """
    limit = learned_positions(backbone)
    if limit is None or not hasattr(datamodule, "encoded_lengths"):
        return
    for split, lengths in datamodule.encoded_lengths().items():
        over = [length for length in lengths if length > limit]
        if over:
            rows = f"{datamodule.place(split)}: {len(over)} of {len(lengths)} rows, of up to {max(over)} tokens, are"
            raise LoRAError(_too_long(rows, limit, backbone))


def learned_positions(backbone: nn.Module) -> int | None:
    """How many tokens there is a position for; None where positions are computed, as rotary ones, or cannot be seen.

    RoBERTa and its kin number positions from behind that of the padding: of their 514 the first two are no token's.
    """
    if backbone not in _FOUND:
        _FOUND[backbone] = _learned_positions(backbone)
    return _FOUND[backbone]


def _learned_positions(backbone: nn.Module) -> int | None:
    if not isinstance(backbone, PreTrainedModel):
        return None
    limit = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    named = ((name.rpartition(".")[2], module) for name, module in backbone.named_modules())
    tables = [m for name, m in named if isinstance(m, nn.Embedding) and OF_POSITIONS.search(name)]
    if not isinstance(limit, int):
        return None
    # (OPT's and BART's have two more than they say, which are never a token's)
    fitting = [table for table in tables if limit <= table.num_embeddings <= limit + 2]
    skipped = [t.padding_idx + 1 for t in fitting if t.num_embeddings == limit and t.padding_idx is not None]
    return limit - max(skipped, default=0) if fitting else None


def _mappings(batch: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(batch, Mapping):
        yield batch
        for part in batch.values():
            yield from _mappings(part)


def _too_long(what: str, limit: int, backbone: nn.Module) -> str:
    return (
        f"{what} longer than the {limit} positions that {type(backbone).__name__} knows: set data.init_args.max_length"
        f" to {limit} or less"
    )
