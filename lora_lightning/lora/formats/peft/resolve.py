"""Translate a PEFT directory into the model's names and into the config that injects the file's adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import AdapterError, did_you_mean, first_few, warn
from lora_lightning.lora.formats.peft.config import (
    CONFIG,
    WEIGHTS,
    find_alphas,
    peft_adapts,
    subtracted_init,
    token_ids,
)
from lora_lightning.lora.formats.peft.keys import (
    A_ENDS,
    OTHER_ENDS,
    PREFIX,
    TOKENS_END,
    canonical_keys,
    is_peft_copy,
    is_trained_bias,
    saved_module,
    strip_wrappers,
)
from lora_lightning.lora.formats.provenance import Record
from lora_lightning.lora.frozen.tensors import get_module, named_modules, plain_state
from lora_lightning.lora.layers import kind_of
from lora_lightning.lora.layers.attention import OutProj
from lora_lightning.lora.layers.conv import is_conv_unlike_peft
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a
from lora_lightning.lora.targets.patterns import matches

Read = Callable[[str], Tensor | None]
"""A function of a name in the model that returns W0's tensor, None where there is none."""


def resolve(
    peft: dict[str, Any],
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    read: Read | None = None,
    *,
    allow_other_base: bool = False,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors for `model`: with canonical keys, ties resolved, and without copies of W0.

    Raises:
        AdapterError: the keys are of several adapters; a copy of W0 is not this model's, and `allow_other_base` is
            False.
    """
    modules = dict(named_modules(model, remove_duplicate=False))
    named = canonical_keys(tensors, modules)
    named = {key: tensor for key, tensor in named.items() if not is_peft_copy(key.removeprefix(PREFIX), modules)}
    peft = {**peft, "modules_to_save": _add_tied_copies(peft, named, modules)}
    return peft, _drop_base_copies(named, peft, model, read, allow_other_base=allow_other_base)


def _add_tied_copies(
    peft: Mapping[str, Any], tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> list[str]:
    """`modules_to_save` with the tied modules that it does not list.

    With `ensure_weight_tying` PEFT trains one copy for input and output embeddings, lists one of them in its config and
    writes the tensors of both.
    """
    listed = list(peft.get("modules_to_save") or [])
    if not peft.get("ensure_weight_tying"):
        return listed
    plain = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    saved = [t for name, t in plain.items() if name.endswith(".weight") and saved_module(name, listed)]
    weights = {name: plain[f"{name}.weight"] for name in modules if f"{name}.weight" in plain}
    others = {name: w for name, w in weights.items() if not saved_module(f"{name}.weight", listed)}
    twins = [n for n, w in others.items() if any(w.shape == t.shape and torch.equal(w, t) for t in saved)]
    return listed + twins


def _drop_base_copies(
    tensors: Mapping[str, Tensor],
    peft: Mapping[str, Any],
    model: nn.Module,
    read: Read | None,
    *,
    allow_other_base: bool,
) -> dict[str, Tensor]:
    """The file's tensors without copies of W0, which PEFT writes of embeddings and the output layer where they are
    adapted, were resized, or `save_embedding_layers` is set."""
    state, listed = plain_state(model), peft.get("modules_to_save") or []
    modules = dict(named_modules(model, remove_duplicate=False))
    root = modules[""]
    head = root.get_output_embeddings() if is_a(root, HF_MODEL) else None  # type: ignore[operator]
    tables = {name for name, module in modules.items() if isinstance(module, nn.Embedding) or module is head}
    remaining: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        full = key.removeprefix(PREFIX)
        name, wrappers = strip_wrappers(full, modules)
        is_ours = name not in state or saved_module(name, listed) or is_trained_bias(full, peft, modules)
        here = None if is_ours else read(name) if read else state[name]
        if here is None:
            remaining[key] = tensor
        elif here.shape == tensor.shape and torch.equal(tensor.to(here.dtype), here.cpu()):
            continue
        elif not (name.endswith(".weight") and (wrappers or name.removesuffix(".weight") in tables)):
            remaining[key] = tensor
        elif not allow_other_base:
            raise AdapterError(
                f"the adapter holds a weight of '{name.removesuffix('.weight')}' that is not this model's: load the"
                f" base that it was made on (resized as it was there), or pass allow_other_base=True to keep this"
                f" model's"
            )
    return remaining


@dataclass
class Contents:
    """What an adapter's file adapts and trains, by names in the backbone."""

    modules: dict[str, int] = field(default_factory=dict)
    """Adapted modules, with PEFT's rank."""
    parameters: dict[str, int] = field(default_factory=dict)
    """Adapted bare parameters, with the rank."""
    tokens: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)


def find_contents(tensors: Mapping[str, Tensor], peft: Mapping[str, Any], model: nn.Module) -> Contents:
    """Sort the file's keys into `Contents`.

    Raises:
        AdapterError: a key without PEFT's prefix, or for a module that the model does not have.
    """
    if strangers := [key for key in tensors if not key.startswith(PREFIX)]:
        raise AdapterError(f"adapter keys must start with '{PREFIX}', got {first_few(strangers, 10)}")
    contents, rest = Contents(), list[str]()
    modules = dict(named_modules(model, remove_duplicate=False))
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        end = next((end for end in (*A_ENDS, *OTHER_ENDS, TOKENS_END) if f".{name}".endswith(end)), "")
        path = f".{name}".removesuffix(end).removeprefix(".")  # empty for the model itself
        if end in A_ENDS:
            _add_adapted(path, tensor, peft, modules, contents)
        elif end == TOKENS_END:
            contents.tokens.append(path)
        elif not end and not is_trained_bias(name, peft, modules):
            rest.append(name)
    unknown = [name for name in (*contents.modules, *contents.tokens) if name not in modules]
    if unknown:
        hint = _fitting_hint(unknown, modules) or did_you_mean(unknown[0], modules)
        named = first_few([f"'{name}'" for name in unknown], 10)
        raise AdapterError(f"the model has no module {named}: {len(unknown)} of the adapter's are missing{hint}")
    contents.saved = _saved_modules(rest, peft.get("modules_to_save") or [], modules)
    return contents


def _add_adapted(
    path: str, A: Tensor, peft: Mapping[str, Any], modules: Mapping[str, nn.Module], contents: Contents
) -> None:
    """Add the module or bare parameter with an A at `path` to `contents`."""
    plain, depth = strip_wrappers(path, modules)
    rank = A.shape[0] if A.dim() else 0
    holder = modules.get(plain)
    if holder is None:
        contents.modules[plain] = rank
        return
    entries = peft.get("target_parameters") or []
    full = {f"{plain}.{n}".removeprefix("."): n for n in holder._parameters}
    adapted = [name for name in full if matches(entries, name)]
    if depth < len(adapted):
        name = adapted[len(adapted) - 1 - depth]
        parameter = holder._parameters[full[name]]
        assert parameter is not None
        contents.parameters[name] = rank // (parameter.shape[0] if parameter.dim() == 3 else 1)
    else:
        contents.modules[plain] = rank


def _fitting_hint(unknown: list[str], modules: Collection[str]) -> str:
    """A hint where the adapter was made on a part of this model, on a larger model, or with separate experts."""
    for outer in modules:
        if outer and 2 * sum(f"{outer}.{name}" in modules for name in unknown) >= len(unknown):
            return f"; it was made on the part '{outer}' of this model: load it into model.get_submodule('{outer}')"
    if any(re.search(r"\.experts\.\d+\.", name) for name in unknown):
        return "; its experts are apart, as before transformers 5: load it in PEFT, which fuses them, and save it there"
    parts = [name.partition(".") for name in unknown]
    firsts = [first for first, dot, rest in parts if dot and rest in modules]
    if 2 * len(firsts) >= len(unknown):
        return f"; it was made on a larger model that holds this one as '{firsts[0]}': load it into one of that class"
    return ""


def _saved_modules(keys: list[str], listed: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Full names of the modules saved in full: the config lists them, and the keys are their tensors."""
    holders = {key: saved_module(key, listed) for key in keys}
    if strangers := [key for key, holder in holders.items() if holder is None]:
        raise AdapterError(
            f"the adapter does not fit this model ({len(strangers)} keys): left over {first_few(strangers, 10)}, which"
            f" are neither A or B nor in a module that modules_to_save lists ({', '.join(listed) or 'none'})"
        )
    for entry in listed:
        hits = [name for name in modules if name == entry] or [n for n in modules if n.endswith(f".{entry}")]
        for name in hits:
            if modules[name].state_dict() and not any(key.startswith(f"{name}.") for key in keys):
                raise AdapterError(f"{CONFIG} saves '{name}' in full and {WEIGHTS} has no tensors for it")
    return sorted({holder for holder in holders.values() if holder is not None})


def refuse_other_targets(peft: Mapping[str, Any], contents: Contents, model: nn.Module) -> None:
    """Raise an AdapterError where the config and the file's tensors name different modules, parameters or rows."""
    for entry in peft.get("target_parameters") or []:
        if not any(matches([entry], name) for name in contents.parameters):
            raise AdapterError(f"{CONFIG} lists '{entry}' in target_parameters and {WEIGHTS} has no tensors for it")
    tokens = peft.get("trainable_token_indices") or []
    for entry in tokens if isinstance(tokens, dict) else [""] if tokens else []:
        if not any(not entry or matches([entry], name) for name in contents.tokens):
            raise AdapterError(
                f"{CONFIG} has trainable_token_indices '{entry}' and {WEIGHTS} has no rows for them: leave that entry"
                " out if its module shares the weight of another that has rows"
            )
    targets = peft.get("target_modules")
    if not targets or targets == "all-linear":
        return  # only the file's keys name the modules
    saved = peft.get("modules_to_save") or []
    for name, module in named_modules(model):
        is_selected = peft_adapts(peft, targets, _peft_name(name, model))
        if name in contents.modules and not is_selected:
            why = "; ensure_weight_tying trained one update for two layers, which have their own here: train without it"
            hint = why if peft.get("ensure_weight_tying") else ""
            raise AdapterError(f"{WEIGHTS} has left over tensors for '{name}', which {CONFIG} does not adapt{hint}")
        if not is_selected or name in contents.modules or kind_of(module) is None:
            continue
        if not any(re.match(rf"(^|.*\.){re.escape(m)}($|\..*)", name) for m in saved):
            raise AdapterError(f"{CONFIG} adapts '{name}' and {WEIGHTS} has no tensors for it")


def refuse_other_arithmetic(contents: Contents, model: nn.Module) -> None:
    """For a file that PEFT trained: an AdapterError where it trained another update than our layers compute, and an
    AdapterWarning of its attentions, whose out_proj it computes with twice the update.
    """
    modules = {name: get_module(model, name) for name in contents.modules}
    if unlike := [name for name, module in modules.items() if is_conv_unlike_peft(module)]:
        raise AdapterError(
            f"PEFT pads the update of {first_few([repr(name) for name in unlike])} with zeros and does not dilate it,"
            " whatever the convolution does: no weight of W0's shape holds what it trained; train it anew here"
        )
    if twice := [name for name, module in modules.items() if isinstance(module, OutProj)]:
        warn(
            f"PEFT (0.21.2) trains with twice the update in {first_few([repr(name) for name in twice])} (its issue"
            " 3774), here it counts once: double these layers' lora_B for what PEFT computes"
        )


def config_for(
    peft: Mapping[str, Any],
    contents: Contents,
    record: Record | None,
    model: nn.Module,
    alphas_in_doubt: Mapping[str, float],
) -> LoRAConfig:
    """The config that injects the file's adapter.

    Ranks come from the tensors, alphas from PEFT's patterns; what PEFT's layout cannot express (`slices`, an attention
    with one adapted projection, dropouts by layer) comes from our record, where there is one.

    Raises:
        AdapterError: the config was changed since it was saved, contradicts the tensors' ranks, or leaves an alpha
            ambiguous; PEFT trained another update than our layers compute.
    """
    r, alpha, rslora = int(peft.get("r", 8)), float(peft.get("lora_alpha", 8)), bool(peft.get("use_rslora"))
    adapted = {**contents.modules, **contents.parameters}
    names = {name: _peft_name(name, model) for name in adapted}
    alphas = find_alphas(peft, names, adapted, alphas_in_doubt)
    if record:
        # The zeros of a projection that is not adapted are not in the record.
        adapted = {name: rank for name, rank in adapted.items() if name in record.settings}
        for name, peft_rank in adapted.items():
            our_r, our_alpha, written = record.settings[name]
            if not math.isclose(alphas[name] / (math.sqrt(peft_rank) if rslora else peft_rank), written, rel_tol=1e-9):
                raise AdapterError(f"{CONFIG} was changed since it was saved: its ranks or alphas")
            adapted[name], alphas[name] = our_r, our_alpha
    else:
        refuse_other_arithmetic(contents, model)
    modules = [name for name in contents.modules if name in adapted]
    dropouts, slices = (record.dropouts, record.slices) if record else ({}, {})
    return LoRAConfig(
        r=r,
        alpha=alpha,
        dropout=float(peft.get("lora_dropout") or 0.0),
        dropout_pattern={exact_pattern(n): p for n, p in dropouts.items() if n in adapted},
        # In a group, so that a module with the name of a preset, such as `attention`, is not taken for the preset.
        target_modules=f"(?:{'|'.join(re.escape(name) for name in modules)})" if modules else [],
        target_parameters=list(contents.parameters) or None,
        trainable_token_indices={name: [*token_ids(peft, name)] for name in contents.tokens} or None,
        modules_to_save=contents.saved or None,
        slices={exact_pattern(n): spec for n, spec in slices.items() if n in modules},
        rank_pattern={exact_pattern(n): rank for n, rank in adapted.items() if rank != r},
        alpha_pattern={exact_pattern(n): alphas[n] for n in adapted if alphas[n] != alpha},
        use_rslora=rslora,
        use_dora=bool(peft.get("use_dora")),
        init=subtracted_init(peft),
        bias=peft.get("bias") or "none",
        lora_bias=bool(peft.get("lora_bias")),
    )


def exact_pattern(name: str) -> str:
    """The pattern that matches this module alone."""
    return f"^{re.escape(name)}$"


def _peft_name(name: str, model: nn.Module) -> str:
    """The name by which PEFT looks up a module's rank and alpha."""
    parent, _, last = name.rpartition(".")
    is_in_attention = last == "out_proj" and isinstance(get_module(model, parent), nn.MultiheadAttention)
    return parent if is_in_attention else name
