"""Rows that hold several documents: how a backbone is told, and the proof that it keeps them apart.

Where documents begin is told by `position_ids`, which restart at 0. transformers makes the block mask from them, where
it is given no `attention_mask` and keeps no cache; flash attention takes the documents' lengths instead. A backbone
that does neither, as a recurrent one, would let documents see each other and say nothing. So its first packed batch is
preceded by a trial on two documents: in one row, each must give what it gives alone, and the second must not change
with the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.layers.tracing import is_traced
from lora_lightning.tasks.base import logits_of
from lora_lightning.tasks.modes import evaluating

TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How far a document's logits in a packed row may be from those alone, as norms: rounding in other shapes.

That of float64 allows for models that take their softmax in float32, and that of float32 for TF32.
"""
LENGTH = 12
"""Tokens of each document of the trial."""

_PROVEN: WeakSet[nn.Module] = WeakSet()


def is_packed(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch's rows are packed: their positions are given, and no mask is."""
    return inputs.get("position_ids") is not None and inputs.get("attention_mask") is None


def as_packed(backbone: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments to call the backbone with, so that documents of a row do not see each other.

    Args:
        inputs: `input_ids` and `position_ids` (b, t), which restart at 0 where a document begins.

    Raises:
        LoRAError: the backbone mixes documents, which is found out once for each backbone.
    """
    if backbone not in _PROVEN and not is_traced():
        refuse_mixing(backbone, inputs["input_ids"])
        _PROVEN.add(backbone)
    return _arguments(backbone, inputs)


def _arguments(backbone: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in inputs.items() if name != "attention_mask"}
    if not isinstance(backbone, PreTrainedModel):
        return own
    own["use_cache"] = False  # with a cache, transformers does not look at positions for where documents begin
    if "flash" in str(backbone.config._attn_implementation):
        own |= flash_lengths(inputs["position_ids"])
    return own


def unpacked(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """A packed batch's documents in rows of their own, with an `attention_mask`: as many as need no more room.

    For whatever is to see the backbone's inputs in their usual form, such as the proof of an export.
    """
    ids, positions = inputs["input_ids"].flatten(), inputs["position_ids"].flatten()
    starts = (positions == 0).nonzero().squeeze(1).tolist()
    documents = [ids[a:b] for a, b in pairwise([*starts, len(ids)])]
    rows, longest = list[Tensor](), 0
    for document in documents:
        longest = max(longest, len(document))
        if rows and (len(rows) + 1) * longest > len(ids):
            break
        rows.append(document)
    mask = [torch.ones_like(row) for row in rows]
    return {"input_ids": pad_sequence(rows, True), "attention_mask": pad_sequence(mask, True)}


def flash_lengths(position_ids: Tensor) -> dict[str, Any]:
    """Documents' bounds over all rows, one row after another, as transformers hands them to flash attention."""
    starts = (position_ids.flatten() == 0).nonzero().squeeze(1)
    bounds = F.pad(starts, (0, 1), value=position_ids.numel()).to(torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


@torch.no_grad()
def refuse_mixing(backbone: nn.Module, input_ids: Tensor) -> None:
    """Run the backbone on two documents in one row, and on each alone.

    Args:
        input_ids: any that it can be given: the documents are made of their tokens.

    Raises:
        LoRAError: documents see each other, or positions are not looked at.
    """
    first, other, second = _documents(input_ids)
    rows = torch.stack([torch.cat([first, second]), torch.cat([other, second])])
    positions = torch.arange(LENGTH, device=rows.device).repeat(2, 2)
    try:
        with evaluating(backbone):
            packed = logits_of(backbone(**_arguments(backbone, {"input_ids": rows, "position_ids": positions})))
            alone = logits_of(backbone(input_ids=torch.stack([first, second])))
    except TypeError as error:  # an argument that its forward does not have
        raise LoRAError(f"{_cannot(backbone)} ({error})") from error
    narrowest = max(_dtypes(backbone, packed), key=lambda dtype: torch.finfo(dtype).eps)
    packed, alone = packed.double(), alone.double()
    change = (packed[0, LENGTH:] - packed[1, LENGTH:]).norm() / alone[1].norm()
    off = (packed[0] - alone.flatten(0, 1)).norm() / alone.norm()
    if not change <= 4 * torch.finfo(narrowest).eps:
        raise LoRAError(f"{_cannot(backbone)}: a document's logits change with the one before it, by {change:.1e}")
    if not off <= TOLERANCE[narrowest]:
        raise LoRAError(f"{_cannot(backbone)}: a document's logits are not those it has alone, by {off:.1e}")


def _documents(input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three of `LENGTH` tokens each; the second differs from the first in every token."""
    known: Tensor = input_ids.unique()  # type: ignore[no-untyped-call]
    if len(known) == 1:
        known = torch.stack([known[0], (known[0] - 1).abs()])
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randint(len(known), (2, LENGTH), generator=draw).to(known.device)
    return known[first], known[(first + 1) % len(known)], known[second]


def _dtypes(backbone: nn.Module, logits: Tensor) -> set[torch.dtype]:
    """Those that its numbers go through."""
    dtypes = {logits.dtype, *(p.dtype for p in backbone.parameters() if p.dtype in TOLERANCE)}
    if torch.is_autocast_enabled(logits.device.type):
        dtypes.add(torch.get_autocast_dtype(logits.device.type))
    return dtypes


def _cannot(backbone: nn.Module) -> str:
    return (
        f"{type(backbone).__name__} cannot be given packed rows, as it does not keep the documents of a row apart by"
        " their position_ids; set data.init_args.packing to false"
    )
