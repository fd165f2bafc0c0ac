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
from lora_lightning.lora.frozen.tensors import full_name, get_module, named_modules, plain_state
from lora_lightning.lora.layers import kind_of
from lora_lightning.lora.layers.attention import OutProj
from lora_lightning.lora.layers.conv import is_conv_unlike_peft
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a
from lora_lightning.lora.targets.patterns import matches

Read = Callable[[str], Tensor | None]
"""A function of a name in the model that returns W0's tensor, None where there is none."""


@dataclass
class Contents:
    """What an adapter's files adapt and train, by names in the backbone."""

    peft: dict[str, Any]
    """PEFT's config, with every tied module that is saved in full."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """By canonical keys, without copies of W0."""
    modules: dict[str, int] = field(default_factory=dict)
    """Adapted modules, with PEFT's rank."""
    parameters: dict[str, int] = field(default_factory=dict)
    """Adapted bare parameters, with the rank."""
    tokens: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)


def resolve(
    peft: dict[str, Any],
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    read: Read | None = None,
    *,
    allow_other_base: bool = False,
) -> Contents:
    """Sort a file's keys into what `model` adapts and trains.

    Copies of W0 are left out: PEFT writes them of embeddings and the output layer where they are adapted, were resized,
    or `save_embedding_layers` is set.

    Raises:
        AdapterError: the keys are of several adapters, have another prefix than PEFT's, or are for modules that the
            model does not have; a copy of W0 is not this model's, and `allow_other_base` is False.
    """
    modules, state = dict(named_modules(model, remove_duplicate=False)), plain_state(model)
    head = modules[""].get_output_embeddings() if is_a(modules[""], HF_MODEL) else None  # type: ignore[operator]
    tables = {f"{name}.weight" for name, m in modules.items() if isinstance(m, nn.Embedding) or m is head}
    keys = canonical_keys(tensors, modules)
    if foreign := [key for key in keys if not key.startswith(PREFIX)]:
        raise AdapterError(f"adapter keys must start with '{PREFIX}', got {first_few(foreign, 10)}")
    named = {key.removeprefix(PREFIX): tensor for key, tensor in keys.items()}
    named = {name: tensor for name, tensor in named.items() if not is_peft_copy(name, modules)}
    listed, others = list(peft.get("modules_to_save") or []), list[str]()
    # With `ensure_weight_tying` PEFT trains one copy for two tied modules, lists one of them and writes both.
    ties = bool(peft.get("ensure_weight_tying"))
    copies = [t for name, t in named.items() if ties and name.endswith(".weight") and saved_module(name, listed)]
    contents = Contents({**peft, "modules_to_save": listed})
    for name, tensor in named.items():
        plain, wrappers = strip_wrappers(name, modules)
        end = next((end for end in (*A_ENDS, *OTHER_ENDS, TOKENS_END) if f".{name}".endswith(end)), "")
        path = f".{name}".removesuffix(end).removeprefix(".")  # empty for the model itself
        if end in A_ENDS:
            _add_adapted(path, tensor, modules, contents)
        elif end == TOKENS_END:
            contents.tokens.append(path)
        elif not end and not is_trained_bias(name, peft, modules):
            if plain in state and not saved_module(plain, listed):
                if plain.endswith(".weight") and any(_is_equal(tensor, copy) for copy in copies):
                    listed.append(plain.removesuffix(".weight"))
                else:
                    here = read(plain) if read else state[plain]
                    is_written = plain in tables or (wrappers > 0 and plain.endswith(".weight"))
                    if here is not None and _is_base_copy(plain, tensor, here, is_written, allow_other_base):
                        continue
            others.append(name)
        contents.tensors[PREFIX + name] = tensor
    if unknown := [name for name in (*contents.modules, *contents.tokens) if name not in modules]:
        hint = _fitting_hint(unknown, modules) or did_you_mean(unknown[0], modules)
        missing = first_few([f"'{name}'" for name in unknown], 10)
        raise AdapterError(f"the model has no module {missing}: {len(unknown)} of the adapter's are missing{hint}")
    contents.saved = _saved_modules(others, listed, modules)
    return contents


def _is_base_copy(name: str, tensor: Tensor, here: Tensor, is_written: bool, allow_other_base: bool) -> bool:
    """Whether a tensor is a copy of W0; an AdapterError where PEFT writes one there and it is another model's."""
    if _is_equal(tensor.to(here.dtype), here.cpu()):
        return True
    if is_written and not allow_other_base:
        raise AdapterError(
            f"the adapter holds a weight of '{name.removesuffix('.weight')}' that is not this model's: load the base"
            " that it was made on (resized as it was there), or pass allow_other_base=True to keep this model's"
        )
    return is_written


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _add_adapted(path: str, A: Tensor, modules: Mapping[str, nn.Module], contents: Contents) -> None:
    """Add the module or bare parameter with an A at `path` to `contents`."""
    plain, depth = strip_wrappers(path, modules)
    rank = A.shape[0] if A.dim() else 0
    parameters = modules[plain]._parameters if plain in modules else {}
    entries = contents.peft.get("target_parameters") or []
    adapted = [key for key in parameters if matches(entries, full_name(plain, key))]
    if depth >= len(adapted):
        contents.modules[plain] = rank
    elif (parameter := parameters[adapted[-1 - depth]]) is not None:
        stacked = parameter.shape[0] if parameter.dim() == 3 else 1
        contents.parameters[full_name(plain, adapted[-1 - depth])] = rank // stacked


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
        for name in [entry] if entry in modules else [n for n in modules if n.endswith(f".{entry}")]:
            if modules[name].state_dict() and not any(key.startswith(f"{name}.") for key in keys):
                raise AdapterError(f"{CONFIG} saves '{name}' in full and {WEIGHTS} has no tensors for it")
    return sorted({holder for holder in holders.values() if holder is not None})


def refuse_other_targets(contents: Contents, model: nn.Module) -> None:
    """Raise an AdapterError where the config and the file's tensors name different modules, parameters or rows."""
    peft, tokens = contents.peft, contents.peft.get("trainable_token_indices")
    rows = [*tokens] if isinstance(tokens, dict) else [""] if tokens else []
    lists = {
        "target_parameters": (peft.get("target_parameters") or [], contents.parameters),
        "trainable_token_indices": (rows, contents.tokens),
    }
    for field_name, (entries, names) in lists.items():
        for entry in entries:
            if not any(not entry or matches([entry], name) for name in names):
                raise AdapterError(
                    f"{CONFIG} has {field_name} '{entry}' and {WEIGHTS} has no tensors for it: leave that entry out"
                    " if its module shares the weight of another that has them"
                )
    targets = peft.get("target_modules")
    if not targets or targets == "all-linear":
        return  # only the file's keys name the modules
    for name, module in named_modules(model):
        is_selected, is_adapted = peft_adapts(peft, targets, _peft_name(name, model)), name in contents.modules
        if is_adapted and not is_selected:
            why = "; ensure_weight_tying trained one update for two layers, which have their own here: train without it"
            hint = why if peft.get("ensure_weight_tying") else ""
            raise AdapterError(f"{WEIGHTS} has left over tensors for '{name}', which {CONFIG} does not adapt{hint}")
        is_saved = any(re.match(rf"(^|.*\.){re.escape(entry)}($|\..*)", name) for entry in peft["modules_to_save"])
        if is_selected and not is_adapted and not is_saved and kind_of(module) is not None:
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
    contents: Contents, record: Record | None, model: nn.Module, alphas_in_doubt: Mapping[str, float]
) -> LoRAConfig:
    """The config that injects the file's adapter.

    Ranks come from the tensors, alphas from PEFT's patterns; what PEFT's layout cannot express (`slices`, an attention
    with one adapted projection, dropouts by layer) comes from our record, where there is one.

    Raises:
        AdapterError: the config was changed since it was saved, contradicts the tensors' ranks, or leaves an alpha
            ambiguous; PEFT trained another update than our layers compute.
    """
    peft, ranks = contents.peft, {**contents.modules, **contents.parameters}
    r, alpha, rslora = int(peft.get("r", 8)), float(peft.get("lora_alpha", 8)), bool(peft.get("use_rslora"))
    alphas = find_alphas(peft, {name: _peft_name(name, model) for name in ranks}, ranks, alphas_in_doubt)
    dropouts, slices = (record.dropouts, record.slices) if record else ({}, {})
    if record is None:
        refuse_other_arithmetic(contents, model)
    else:
        # The zeros of a projection that is not adapted are not in the record.
        ranks = {name: rank for name, rank in ranks.items() if name in record.settings}
        for name, rank in ranks.items():
            written = alphas[name] / (math.sqrt(rank) if rslora else rank)
            ranks[name], alphas[name], scale = record.settings[name]
            if not math.isclose(written, scale, rel_tol=1e-9):
                raise AdapterError(f"{CONFIG} was changed since it was saved: its ranks or alphas")
    modules = [name for name in ranks if name in contents.modules]
    return LoRAConfig(
        r=r,
        alpha=alpha,
        dropout=float(peft.get("lora_dropout") or 0.0),
        dropout_pattern={exact_pattern(name): p for name, p in dropouts.items() if name in ranks},
        # In a group, so that a module with the name of a preset, such as `attention`, is not taken for the preset.
        target_modules=f"(?:{'|'.join(map(re.escape, modules))})" if modules else [],
        target_parameters=list(contents.parameters) or None,
        trainable_token_indices={name: [*token_ids(peft, name)] for name in contents.tokens} or None,
        modules_to_save=contents.saved or None,
        slices={exact_pattern(name): spec for name, spec in slices.items() if name in modules},
        rank_pattern={exact_pattern(name): rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={exact_pattern(name): alphas[name] for name in ranks if alphas[name] != alpha},
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
