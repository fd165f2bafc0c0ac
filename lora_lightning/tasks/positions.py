"""The maximal length of rows; and packed rows of several documents, with a check that the backbone separates them.

`position_ids`, which restart at 0, mark the beginnings of documents. transformers makes the block mask from them if
there is no `attention_mask` and no cache; flash attention takes the documents' lengths instead. A backbone that does
neither, such as a recurrent one, would silently mix documents. So before its first packed batch it runs on two
documents: in one row, each must give the result that it gives alone, and the second must not depend on the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.layers.tracing import is_traced
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a
from lora_lightning.tasks.base import logits_of


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in eval mode; afterwards each module's mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


OF_POSITIONS = re.compile(r"pos|wpe")
"""Matches the last part of the name of an embedding of positions."""

_FOUND: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


def refuse_too_long(backbone: nn.Module, batch: Any) -> None:
    """Raise where a row goes beyond the model's last position, which on a GPU would end the process.

    Args:
        backbone: only transformers' models have a known number of positions.
        batch: any; `input_ids` (b, t) in it and in mappings within are checked, with `position_ids` in packed rows.
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


def refuse_long_text(backbone: nn.Module, prompts: int, width: int, options: Any) -> None:
    """Raise where a text may be written beyond the model's last position, which on a GPU would end the process.

    Args:
        prompts: tokens of the longest prompt; 0 for an encoder-decoder, whose decoder begins anew.
        width: tokens of the padded prompts, which `max_length` counts.
        options: the `GenerationConfig`, with `max_new_tokens` or `max_length`.
    """
    limit, new = learned_positions(backbone), options.max_new_tokens or options.max_length - width
    if limit is not None and prompts + new > limit + 1:  # the last token is not read again
        raise LoRAError(
            f"a prompt of {prompts} tokens and up to {new} new ones are longer than the {limit} positions of"
            f" {type(backbone).__name__}: set max_new_tokens of generation to {max(limit + 1 - prompts, 1)} or less,"
            " or shorten the prompts"
        )


def refuse_long_rows(backbone: nn.Module, datamodule: Any) -> None:
    """Raise before the first batch where a split of a DataModule has rows that are too long, with their number."""
    limit = learned_positions(backbone)
    if limit is None or not hasattr(datamodule, "encoded_lengths"):
        return
    for split, lengths in datamodule.encoded_lengths().items():
        over = [length for length in lengths if length > limit]
        if over:
            rows = f"{datamodule.place(split)}: {len(over)} of {len(lengths)} rows, of up to {max(over)} tokens, are"
            raise LoRAError(_too_long(rows, limit, backbone))


def learned_positions(backbone: nn.Module) -> int | None:
    """The number of learned positions; None where positions are computed, such as rotary ones, or unknown.

    RoBERTa and similar models number positions after that of the padding: the first two of their 514 are unused.
    """
    if backbone in _FOUND or not is_a(backbone, HF_MODEL):
        return _FOUND.get(backbone)
    limit = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator, union-attr]
    named = ((name.rpartition(".")[2], module) for name, module in backbone.named_modules())
    tables = [m for name, m in named if isinstance(m, nn.Embedding) and OF_POSITIONS.search(name)]
    _FOUND[backbone] = None
    if isinstance(limit, int):
        # (OPT's and BART's tables have two more rows than the config says, which are unused)
        fitting = [table for table in tables if limit <= table.num_embeddings <= limit + 2]
        skipped = [t.padding_idx + 1 for t in fitting if t.num_embeddings == limit and t.padding_idx is not None]
        _FOUND[backbone] = limit - max(skipped, default=0) if fitting else None
    return _FOUND[backbone]


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


TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest relative difference, in norm, of a document's logits in a packed row from those alone, due to rounding.

That of float64 allows for models with a float32 softmax, and that of float32 for TF32.
"""
LENGTH = 12
"""Tokens of each document of the check."""

_PROVEN: WeakSet[nn.Module] = WeakSet()


def is_packed(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch's rows are packed: it has positions and no mask."""
    return inputs.get("position_ids") is not None and inputs.get("attention_mask") is None


def as_packed(backbone: Any, inputs: Mapping[str, Any], *, check: bool = True) -> dict[str, Any]:
    """Return the backbone's arguments with which documents of a row do not attend to each other.

    A backbone that mixes them all the same is refused, by one check for each.

    Args:
        inputs: `input_ids` and `position_ids` (b, t), which restart at 0 where a document begins.
    """
    if check and backbone not in _PROVEN and not is_traced():
        refuse_mixing(backbone, inputs["input_ids"])
        _PROVEN.add(backbone)
    arguments = {name: value for name, value in inputs.items() if name != "attention_mask"}
    if not is_a(backbone, HF_MODEL):
        return arguments
    arguments["use_cache"] = False  # with a cache, transformers ignores where positions restart
    if "flash" in str(backbone.config._attn_implementation):
        # The documents' bounds over all rows in order, as transformers passes them to flash attention.
        positions = inputs["position_ids"].flatten()
        bounds = F.pad((positions == 0).nonzero().squeeze(1), (0, 1), value=len(positions)).to(torch.int32)
        longest = int(bounds.diff().max())
        arguments |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds)
        arguments |= dict.fromkeys(("max_length_q", "max_length_k"), longest)
    return arguments


def unpack(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Put a packed batch's documents into separate rows with an `attention_mask`, as many as need no more memory.

    For code that needs the backbone's inputs in their usual form, such as the check of an export.
    """
    ids, positions = inputs["input_ids"].flatten(), inputs["position_ids"].flatten()
    documents = ids.tensor_split((positions == 0).nonzero().squeeze(1).cpu())[1:]
    rows, longest = list[Tensor](), 0
    for document in documents:
        longest = max(longest, len(document))
        if rows and (len(rows) + 1) * longest > len(ids):
            break
        rows.append(document)
    mask = [torch.ones_like(row) for row in rows]
    return {"input_ids": pad_sequence(rows, True), "attention_mask": pad_sequence(mask, True)}


@torch.no_grad()
def refuse_mixing(backbone: nn.Module, input_ids: Tensor) -> None:
    """Raise unless the backbone gives two documents of these tokens in one row the same results as alone."""
    cannot = (
        f"{type(backbone).__name__} cannot be given packed rows, as it does not keep the documents of a row apart by"
        " their position_ids; set data.init_args.packing to false"
    )
    known: Tensor = input_ids.unique()  # type: ignore[no-untyped-call]
    if len(known) == 1:
        known = torch.stack([known[0], (known[0] - 1).abs()])
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randint(len(known), (2, LENGTH), generator=draw).to(known.device)
    other = (first + 1) % len(known)  # which differs from the first in every token
    rows = known[torch.stack([torch.cat([first, second]), torch.cat([other, second])])]
    positions = torch.arange(LENGTH, device=rows.device).repeat(2, 2)
    arguments = as_packed(backbone, {"input_ids": rows, "position_ids": positions}, check=False)
    try:
        with in_evaluation(backbone):
            packed = logits_of(backbone(**arguments))
            alone = logits_of(backbone(input_ids=known[torch.stack([first, second])]))
    except TypeError as error:  # an argument that its forward does not have
        raise LoRAError(f"{cannot} ({error})") from error
    dtypes = {packed.dtype, *(p.dtype for p in backbone.parameters() if p.dtype in TOLERANCE)}
    if torch.is_autocast_enabled(packed.device.type):
        dtypes.add(torch.get_autocast_dtype(packed.device.type))
    narrowest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    packed, alone = packed.double(), alone.double()
    change = (packed[0, LENGTH:] - packed[1, LENGTH:]).norm() / alone[1].norm()
    off = (packed[0] - alone.flatten(0, 1)).norm() / alone.norm()
    if not change <= 4 * torch.finfo(narrowest).eps:
        raise LoRAError(f"{cannot}: a document's logits change with the one before it, by {change:.1e}")
    if not off <= TOLERANCE[narrowest]:
        raise LoRAError(f"{cannot}: a document's logits are not those it has alone, by {off:.1e}")
