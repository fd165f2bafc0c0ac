"""How long a row a model can be given, where it has learnt an embedding for each position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_lightning.lora.errors import LoRAError

_FOUND: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


def refuse_too_long(backbone: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise where a row goes beyond the model's last position: an IndexError, and on a GPU the end of the process.

    Args:
        inputs: `input_ids` (b, t), and `position_ids` where several documents share a row.
    """
    if backbone not in _FOUND:
        _FOUND[backbone] = learned_positions(backbone)
    limit, ids, positions = _FOUND[backbone], inputs.get("input_ids"), inputs.get("position_ids")
    if limit is None or not isinstance(ids, Tensor) or ids.shape[-1] <= limit:
        return
    longest = ids.shape[-1] if positions is None else int(positions.max()) + 1
    if longest > limit:
        raise LoRAError(
            f"a row of {longest} tokens is longer than the {limit} positions that {type(backbone).__name__} knows:"
            " lower data.init_args.max_length"
        )


def learned_positions(backbone: nn.Module) -> int | None:
    """How many there are; None where they are computed, as rotary ones, or where that cannot be seen."""
    if not isinstance(backbone, PreTrainedModel):
        return None
    config = backbone.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    tables = [m.num_embeddings for m in backbone.modules() if isinstance(m, nn.Embedding)]
    if not isinstance(limit, int) or limit == config.vocab_size:
        return None
    # (OPT's has two more than it says, which are never a token's)
    return limit if any(limit <= rows <= limit + 2 for rows in tables) else None
