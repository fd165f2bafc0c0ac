"""From a PEFT directory to our config: which modules, parameters and rows its tensors are for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import AdapterError, did_you_mean, some
from lora_lightning.lora.formats.peft.config import (
    CONFIG,
    WEIGHTS,
    holder,
    peft_adapts,
    peft_selects,
    start_in_file,
    token_ids,
)
from lora_lightning.lora.formats.peft.keys import prefix_hint
from lora_lightning.lora.formats.peft.packing import PREFIX
from lora_lightning.lora.formats.peft.patterns import check_rank, trained_alphas
from lora_lightning.lora.formats.peft.wrappers import is_trained_bias, unwrapped
from lora_lightning.lora.formats.provenance import Record
from lora_lightning.lora.layers import kind_of

A_ENDS = (".lora_A.weight", ".lora_embedding_A")
OTHER_ENDS = (".lora_B.weight", ".lora_embedding_B", ".lora_B.bias", ".lora_magnitude_vector")
TOKENS_END = ".token_adapter.trainable_tokens_delta"


@dataclass
class Contents:
    """What an adapter's file is about, by names in the backbone."""

    modules: dict[str, int] = field(default_factory=dict)
    """Adapted modules, with PEFT's rank."""
    parameters: dict[str, int] = field(default_factory=dict)
    """Adapted bare parameters, with the rank."""
    tokens: list[str] = field(default_factory=list)
    """Embeddings with trained rows."""
    saved: list[str] = field(default_factory=list)
    """Modules saved in full."""


def contents(tensors: Mapping[str, Tensor], peft: dict[str, Any], model: nn.Module) -> Contents:
    """Sort the file's keys.

    Raises:
        AdapterError: a key without PEFT's prefix, or for a module that the model does not have.
    """
    strangers = [key for key in tensors if not key.startswith(PREFIX)]
    if strangers:
        raise AdapterError(f"adapter keys must start with '{PREFIX}', got {some(strangers, 10)}")
    found, rest = Contents(), list[str]()
    modules = dict(model.named_modules(remove_duplicate=False))
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        end = next((end for end in (*A_ENDS, *OTHER_ENDS, TOKENS_END) if f".{name}".endswith(end)), "")
        path = f".{name}".removesuffix(end).removeprefix(".")  # empty for the model itself
        if end in A_ENDS:
            _note_adapter(path, tensor, peft, modules, found)
        elif end == TOKENS_END:
            found.tokens.append(path)
        elif not end and not is_trained_bias(name, peft, modules):
            rest.append(name)
    unknown = [name for name in (*found.modules, *found.tokens) if name not in modules]
    if unknown:
        hint = prefix_hint(unknown, model) or did_you_mean(unknown[0], modules)
        named = some([f"'{name}'" for name in unknown], 10)
        raise AdapterError(f"the model has no module {named}: {len(unknown)} of the adapter's are missing{hint}")
    found.saved = _saved_modules(rest, peft.get("modules_to_save") or [], model)
    return found


def _note_adapter(
    path: str, A: Tensor, peft: dict[str, Any], modules: Mapping[str, nn.Module], found: Contents
) -> None:
    """PEFT wraps a module once more for each adapted parameter, and an attention's `out_proj` inside its wrapper."""
    plain, depth = unwrapped(path, modules)
    rank = A.shape[0] if A.dim() else 0
    holder, parent = modules.get(plain), modules.get(plain.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention) or holder is None:
        found.modules[plain] = rank
        return
    entries = peft.get("target_parameters") or []
    full = {f"{plain}.{n}".removeprefix("."): n for n in holder._parameters}
    own = [name for name in full if peft_selects(entries, name)]
    if depth < len(own):
        name = own[len(own) - 1 - depth]
        parameter = holder._parameters[full[name]]
        assert parameter is not None
        found.parameters[name] = rank // (parameter.shape[0] if parameter.dim() == 3 else 1)
    else:
        found.modules[plain] = rank


def _saved_modules(keys: list[str], listed: list[str], model: nn.Module) -> list[str]:
    """Full names of the modules saved in full: those that hold `keys` and that the config lists."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    holders = {key: holder(key, listed) for key in keys}
    strangers = [key for key, holder in holders.items() if holder is None]
    if strangers:
        raise AdapterError(
            f"the adapter does not fit this model ({len(strangers)} keys): left over {some(strangers, 10)}, which are"
            f" neither A or B nor in a module that modules_to_save lists ({', '.join(listed) or 'none'})"
        )
    for entry in listed:
        hits = [name for name in names if name == entry] or [name for name in names if name.endswith(f".{entry}")]
        bare = [n for n in hits if model.get_submodule(n).state_dict() and not any(k.startswith(f"{n}.") for k in keys)]
        if bare:
            raise AdapterError(f"{CONFIG} saves '{bare[0]}' in full and {WEIGHTS} has no tensors for it")
    return sorted({holder for holder in holders.values() if holder is not None})


def check_targets(peft: dict[str, Any], found: Contents, model: nn.Module) -> None:
    """Refuse where the config and the file's tensors name different modules, parameters or rows."""
    for entry in peft.get("target_parameters") or []:
        if not any(peft_selects([entry], name) for name in found.parameters):
            raise AdapterError(f"{CONFIG} lists '{entry}' in target_parameters and {WEIGHTS} has no tensors for it")
    tokens = peft.get("trainable_token_indices") or []
    for entry in tokens if isinstance(tokens, dict) else [""] if tokens else []:
        if not any(not entry or peft_selects([entry], name) for name in found.tokens):
            raise AdapterError(f"{CONFIG} has trainable_token_indices '{entry}' and {WEIGHTS} has no rows for them")
    targets = peft.get("target_modules")
    if not targets or targets == "all-linear":
        return  # the file's keys are all there is to go by
    saved = peft.get("modules_to_save") or []
    for name, module in model.named_modules():
        selected = peft_adapts(peft, targets, _peft_name(name, model))
        if name in found.modules and not selected:
            raise AdapterError(f"{WEIGHTS} has left over tensors for '{name}', which {CONFIG} does not adapt")
        if not selected or name in found.modules or kind_of(module) is None:
            continue
        if not any(re.match(rf"(^|.*\.){re.escape(m)}($|\..*)", name) for m in saved):
            raise AdapterError(f"{CONFIG} adapts '{name}' and {WEIGHTS} has no tensors for it")


def our_config(
    peft: dict[str, Any],
    found: Contents,
    record: Record | None,
    model: nn.Module,
    alphas_in_doubt: Mapping[str, float],
) -> LoRAConfig:
    """The config that injects what the file holds.

    Ranks come from the tensors, alphas from PEFT's patterns; what PEFT's layout cannot say (`slices`, an
    attention of which one projection is adapted, dropouts by layer) from our record, where there is one.

    Raises:
        AdapterError: the config was changed since we wrote it, or does not go with the tensors' ranks, or leaves an
            alpha in doubt.
    """
    r, alpha, rslora = int(peft.get("r", 8)), float(peft.get("lora_alpha", 8)), bool(peft.get("use_rslora"))
    adapted = {**found.modules, **found.parameters}
    names = {name: _peft_name(name, model) for name in adapted}
    for name, rank in adapted.items():
        check_rank(peft, name, names[name], rank)
    alphas = trained_alphas(peft, names, adapted, alphas_in_doubt)
    if record:
        # A projection that only fills PEFT's form is not in the record.
        adapted = {name: rank for name, rank in adapted.items() if name in record.settings}
        for name, peft_rank in adapted.items():
            own_r, own_alpha, written = record.settings[name]
            if not math.isclose(alphas[name] / (math.sqrt(peft_rank) if rslora else peft_rank), written, rel_tol=1e-9):
                raise AdapterError(f"{CONFIG} was changed since it was saved: its ranks or alphas")
            adapted[name], alphas[name] = int(own_r), own_alpha
    modules = [name for name in found.modules if name in adapted]
    dropouts, slices = (record.dropouts, record.slices) if record else ({}, {})
    return LoRAConfig(
        r=r,
        alpha=alpha,
        dropout=float(peft.get("lora_dropout") or 0.0),
        dropout_pattern={_exactly(n): p for n, p in dropouts.items() if n in adapted},
        # In a group of its own: a module by the name of a preset, such as `attention`, is meant as a name.
        target_modules=f"(?:{'|'.join(re.escape(name) for name in modules)})" if modules else [],
        target_parameters=list(found.parameters) or None,
        trainable_token_indices={name: token_ids(peft, name) for name in found.tokens} or None,
        modules_to_save=found.saved or None,
        slices={_exactly(n): spec for n, spec in slices.items() if n in modules},
        rank_pattern={_exactly(n): rank for n, rank in adapted.items() if rank != r},
        alpha_pattern={_exactly(n): alphas[n] for n in adapted if alphas[n] != alpha},
        use_rslora=rslora,
        use_dora=bool(peft.get("use_dora")),
        init=start_in_file(peft),
        bias=peft.get("bias") or "none",
        lora_bias=bool(peft.get("lora_bias")),
    )


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def _peft_name(name: str, model: nn.Module) -> str:
    """The name by which PEFT looks up a rank and an alpha."""
    parent, _, last = name.rpartition(".")
    in_attention = last == "out_proj" and isinstance(model.get_submodule(parent), nn.MultiheadAttention)
    return parent if in_attention else name
