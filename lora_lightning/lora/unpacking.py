"""From a PEFT directory to our config: which modules, parameters and rows its tensors are for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import AdapterError, did_you_mean
from lora_lightning.lora.layers import kind_of

PREFIX = "base_model.model."
PROVENANCE = "lora_lightning"
A_ENDS = (".lora_A.weight", ".lora_embedding_A")
B_ENDS = (".lora_B.weight", ".lora_embedding_B")
TOKENS_END = ".token_adapter.trainable_tokens_delta"
BASE_END = ".base_layer.weight"


@dataclass
class Contents:
    """What an adapter's file is about, by names in the backbone."""

    modules: dict[str, int] = field(default_factory=dict)
    """Adapted modules, with PEFT's rank."""
    parameters: dict[str, int] = field(default_factory=dict)
    """Adapted bare parameters, with the rank."""
    tokens: list[str] = field(default_factory=list)
    """Embeddings with trained rows."""
    bases: dict[str, Tensor] = field(default_factory=dict)
    """Whole matrices of the base, which PEFT writes beside an adapted embedding."""
    saved: list[str] = field(default_factory=list)
    """Modules saved in full."""


def contents(tensors: Mapping[str, Tensor], peft: dict[str, Any], model: nn.Module) -> Contents:
    """Sort the file's keys.

    Raises:
        AdapterError: a key without PEFT's prefix, or for a module that the model does not have.
    """
    strangers = [key for key in tensors if not key.startswith(PREFIX)]
    if strangers:
        raise AdapterError(f"adapter keys must start with '{PREFIX}', got {some(strangers)}")
    found = Contents()
    modules = dict(model.named_modules(remove_duplicate=False))
    rest = []
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        end = next((end for end in (*A_ENDS, *B_ENDS, TOKENS_END, BASE_END) if f".{name}".endswith(end)), "")
        path = f".{name}".removesuffix(end).removeprefix(".")  # empty for the model itself
        if end in A_ENDS:
            _note_adapter(path, tensor, peft, modules, found)
        elif end == TOKENS_END:
            found.tokens.append(path)
        elif end == BASE_END:
            found.bases[path] = tensor
        elif not end:
            rest.append(name)
    found.saved = sorted({name.rpartition(".")[0] for name in rest})
    unknown = [name for name in (*found.modules, *found.tokens, *found.bases) if name not in modules]
    if unknown:
        hint = did_you_mean(unknown[0], modules)
        raise AdapterError(
            f"the model has no module '{unknown[0]}' ({len(unknown)} of the adapter's are missing){hint}"
        )
    return found


def _note_adapter(
    path: str, A: Tensor, peft: dict[str, Any], modules: Mapping[str, nn.Module], found: Contents
) -> None:
    """PEFT wraps a module once more for each adapted parameter, and an attention's `out_proj` inside its wrapper."""
    plain, depth = f".{path}".replace(".base_layer", "").removeprefix("."), f".{path}".count(".base_layer")
    rank = A.shape[0] if A.dim() else 0
    holder, parent = modules.get(plain), modules.get(plain.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention) or holder is None:
        found.modules[plain] = rank
        return
    entries = peft.get("target_parameters") or []
    full = {f"{plain}.{n}".removeprefix("."): n for n in holder._parameters}
    own = [name for name in full if any(_ends(name, entry) for entry in entries)]
    if depth < len(own):
        name = own[len(own) - 1 - depth]
        parameter = holder._parameters[full[name]]
        assert parameter is not None
        found.parameters[name] = rank // (parameter.shape[0] if parameter.dim() == 3 else 1)
    else:
        found.modules[plain] = rank


def provenance(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What `save_adapter` wrote beside PEFT's own; empty for another's file.

    Raises:
        AdapterError: it cannot be read.
    """
    try:
        record = json.loads(metadata.get(PROVENANCE, "{}"))
    except ValueError as error:
        raise AdapterError(f"the adapter's record of its base cannot be read ({error})") from error
    if not isinstance(record, dict):
        raise AdapterError(f"the adapter's record of its base cannot be read (got {type(record).__name__})")
    return record


def check_targets(peft: dict[str, Any], found: Contents, model: nn.Module) -> None:
    """Raise for the modules that the config names and that the file has no tensors for."""
    targets = peft.get("target_modules")
    if targets is None or targets == "all-linear" or peft.get("layers_to_transform") is not None:
        return
    excluded = peft.get("exclude_modules") or []
    saved = peft.get("modules_to_save") or []
    for name, module in model.named_modules():
        if not _peft_selects(targets, name) or _peft_selects(excluded, name) or kind_of(module) is None:
            continue
        if name not in found.modules and not any(re.match(rf"(^|.*\.){re.escape(m)}($|\..*)", name) for m in saved):
            raise AdapterError(f"adapter_config.json adapts '{name}' and the adapter's file has no tensors for it")


def our_config(peft: dict[str, Any], found: Contents, record: dict[str, Any], model: nn.Module) -> LoRAConfig:
    """The config that injects what the file holds.

    Ranks come from the tensors, alphas as PEFT resolves its patterns; what PEFT's layout cannot say (`slices`, an
    attention of which one projection is adapted) from our record, where there is one.
    """
    r, alpha, rslora = int(peft.get("r", 8)), float(peft.get("lora_alpha", 8)), bool(peft.get("use_rslora"))
    recorded: dict[str, list[float]] = record.get("modules", {})
    slices: dict[str, Any] = record.get("slices", {})
    # A projection that only fills PEFT's form is not in the record.
    modules = {n: rank for n, rank in found.modules.items() if not recorded or n in recorded}
    alphas = peft.get("alpha_pattern") or {}
    ranks, own_alphas = {}, {}
    for name, peft_rank in {**modules, **found.parameters}.items():
        peft_alpha = float(_peft_pattern(alphas, _peft_name(name, model), alpha))
        ranks[name], own_alphas[name] = peft_rank, peft_alpha
        if name in recorded and len(recorded[name]) == 3:
            own_r, own_alpha, written = recorded[name]
            now = peft_alpha / (math.sqrt(peft_rank) if rslora else peft_rank)
            ranks[name] = int(own_r)
            own_alphas[name] = own_alpha if math.isclose(now, written) else own_alpha * now / written
    return LoRAConfig(
        r=r,
        alpha=alpha,
        dropout=float(peft.get("lora_dropout") or 0.0),
        target_modules="|".join(re.escape(name) for name in modules) or [],
        target_parameters=list(found.parameters) or None,
        trainable_token_indices={name: token_ids(peft, name) for name in found.tokens} or None,
        modules_to_save=found.saved or None,
        slices={f"^{re.escape(n)}$": spec for n, spec in slices.items() if n in modules},
        rank_pattern={f"^{re.escape(n)}$": rank for n, rank in ranks.items() if rank != r},
        alpha_pattern={f"^{re.escape(n)}$": a for n, a in own_alphas.items() if a != alpha},
        use_rslora=rslora,
    )


def token_ids(peft: dict[str, Any], name: str) -> list[int]:
    """The token numbers of an embedding's rows, in the file's order.

    Raises:
        AdapterError: the config does not say.
    """
    indices = peft.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((numbers for entry, numbers in indices.items() if _ends(name, entry)), None)
    if not indices:
        raise AdapterError(f"the adapter has token rows for '{name}' and its config no trainable_token_indices for it")
    return [int(number) for number in indices]


def some(items: list[str], limit: int = 4) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _peft_name(name: str, model: nn.Module) -> str:
    """The name by which PEFT looks up a rank and an alpha."""
    parent = name.rpartition(".")[0]
    is_parameter = name not in dict(model.named_modules(remove_duplicate=False))
    return name if is_parameter or not isinstance(model.get_submodule(parent), nn.MultiheadAttention) else parent


def _ends(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _peft_selects(pattern: str | list[str], name: str) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(_ends(name, entry) for entry in pattern)


def _peft_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """PEFT's rule: the first key in the file's order that matches the name or a dotted end of it."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)
