"""What PEFT writes for input and output embeddings that share one weight, read as what it means here.

With `ensure_weight_tying` PEFT adapts both by one pair of factors, or trains one copy for both, lists the embedding
alone in its config and writes the tensors of both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.formats.peft.config import holder, peft_selects
from lora_lightning.lora.formats.peft.packing import PREFIX


def with_ties(peft: dict[str, Any], tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """PEFT's config with the tied partners listed that its file has tensors for.

    Raises:
        AdapterError: one pair of factors adapts two modules that share one weight in `model`.
    """
    peft = _without_tied_rows(peft, tensors, model)
    if not peft.get("ensure_weight_tying"):
        return peft
    peft = {**peft, "modules_to_save": _with_tied_copies(peft, tensors, model)}
    for head, embedding in _tied_factors(tensors):
        modules = dict(model.named_modules())
        if head in modules and embedding in modules and _weight(modules[head]) is _weight(modules[embedding]):
            raise AdapterError(
                f"PEFT trained one update for '{embedding}' and '{head}', which share one weight"
                f" (ensure_weight_tying): a layer here has its own. Load the base untied and the two are adapted alike:"
                f" config.tie_word_embeddings=False, and a clone of the embedding's weight in '{head}'"
            )
        peft["target_modules"] = _also(peft.get("target_modules"), head)
    return peft


def _tied_factors(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Names of (linear, embedding) whose factors are each other's transposes."""
    end = ".lora_embedding_A"
    embeddings = [key.removesuffix(end) for key in tensors if key.endswith(end)]
    heads = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return [
        (head.removeprefix(PREFIX), embedding.removeprefix(PREFIX))
        for embedding in embeddings
        for head in heads
        if _transposed(tensors.get(f"{head}.lora_A.weight"), tensors.get(f"{embedding}.lora_embedding_B"))
        and _transposed(tensors.get(f"{head}.lora_B.weight"), tensors.get(f"{embedding}.lora_embedding_A"))
    ]


def _transposed(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.dim() == other.dim() == 2 and torch.equal(one, other.t())


def _also(targets: Any, name: str) -> Any:
    if not targets or targets == "all-linear":
        return targets
    return f"(?:{targets})|{re.escape(name)}" if isinstance(targets, str) else [*targets, name]


def _with_tied_copies(peft: dict[str, Any], tensors: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """`modules_to_save` and the modules whose weight in the file is that of a listed one."""
    listed = list(peft.get("modules_to_save") or [])
    weights = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if key.endswith(".weight")}
    saved = [tensor for name, tensor in weights.items() if holder(name, listed)]
    for name, _ in model.named_modules():
        own = weights.get(f"{name}.weight")
        if own is None or holder(f"{name}.weight", listed):
            continue
        if any(own.shape == other.shape and torch.equal(own, other) for other in saved):
            listed.append(name)
    return listed


def _without_tied_rows(peft: dict[str, Any], tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """Less the entries of `trainable_token_indices` whose module follows, by a shared weight, one that has rows."""
    indices = peft.get("trainable_token_indices")
    if not isinstance(indices, dict):
        return peft
    modules = dict(model.named_modules())
    names = {entry: [name for name in modules if peft_selects([entry], name)] for entry in indices}
    end = ".token_adapter.trainable_tokens_delta"
    rows = {key.removeprefix(PREFIX).removesuffix(end) for key in tensors if key.endswith(end)}
    leading = [entry for entry in indices if rows & set(names[entry])]
    heads = {id(_weight(modules[name])): entry for entry in leading for name in names[entry]}
    kept = {}
    for entry, numbers in indices.items():
        lead = next((heads.get(id(_weight(modules[name]))) for name in names[entry]), None)
        if entry in leading or lead is None or list(indices[lead]) != list(numbers):
            kept[entry] = numbers
    return {**peft, "trainable_token_indices": kept}


def _weight(module: nn.Module) -> Tensor | None:
    return module._parameters.get("weight")
