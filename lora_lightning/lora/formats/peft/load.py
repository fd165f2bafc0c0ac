"""The only way in which an adapter is loaded: read, resolve, inject, fill.

`AdapterFiles.read` reads a directory, `resolve` translates its keys and config into the model's names, `config_for`
makes our config of them, `inject_and_fill` injects the layers and loads their tensors. A warm start, a model on the
meta device and loralib's checkpoints use the same functions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import AdapterError, ConfigError, TargetError, did_you_mean, first_few, warn
from lora_lightning.lora.formats.peft import keys
from lora_lightning.lora.formats.peft.config import (
    CONFIG,
    PICKLED,
    WEIGHTS,
    find_alphas,
    peft_adapts,
    read_config,
    subtracted_init,
    token_ids,
)
from lora_lightning.lora.formats.peft.keys import PREFIX, strip_wrappers
from lora_lightning.lora.formats.peft.layout import from_peft
from lora_lightning.lora.formats.provenance import Record, check_base, read_record
from lora_lightning.lora.formats.tensor_files import read_pickled, read_tensors
from lora_lightning.lora.frozen.tensors import (
    adapter_tensors,
    full_name,
    get_module,
    named_modules,
    plain_state,
    refuse_misfits,
)
from lora_lightning.lora.init import from_weight
from lora_lightning.lora.inject import inject, remove
from lora_lightning.lora.layers import Grafted, kind_of
from lora_lightning.lora.layers.attention import OutProj
from lora_lightning.lora.layers.conv import is_conv_unlike_peft
from lora_lightning.lora.report import InjectionReport
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a
from lora_lightning.lora.targets.patterns import matches


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    allow_other_base: bool = False,
    alphas: Mapping[str, float] | None = None,
) -> InjectionReport:
    """Inject what a PEFT directory describes into a plain `model` and load its weights.

    Nothing but tensors is unpickled from an old `adapter_model.bin`. Ranks come from the tensors, alphas from PEFT's
    patterns. An adapter without a fingerprint of W0, as PEFT writes it, is loaded with a warning.

    Args:
        alphas: by full module name, where several entries of PEFT's `alpha_pattern` match a module: PEFT's file does
            not say which one was used in training. The error without them names the modules.

    Raises:
        AdapterError: a file is missing, torn or was changed since; a key is missing, left over or wrongly shaped;
            a setting has no counterpart here; the model has no module that the adapter names; the adapter was
            made on another W0 and `allow_other_base` is False. The model is then unchanged.
        LoRAError: the model is adapted already.
    """
    files = AdapterFiles.read(Path(directory))
    refuse_meta(model)
    check_base(files.record, model, allow_other_base=allow_other_base, replaced=files.peft.get("modules_to_save") or ())
    return load_files(model, files, allow_other_base=allow_other_base, alphas=alphas)


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """What an adapter's directory holds, read once; there is no record where PEFT wrote it."""

    directory: Path
    peft: dict[str, Any]
    tensors: dict[str, Tensor]
    """By their keys in the file."""
    record: Record | None

    @classmethod
    def read(cls, directory: Path) -> AdapterFiles:
        """Read both files; an AdapterError where one is missing, torn, changed since, or not of finite tensors."""
        peft = read_config(directory / CONFIG)
        weights, pickled, metadata = directory / WEIGHTS, directory / PICKLED, dict[str, str]()
        if weights.exists():
            tensors, metadata = read_tensors(weights)
        elif pickled.is_file():
            tensors = read_pickled(pickled)
        else:
            raise AdapterError(
                f"no file {weights}, and no {PICKLED} beside it: an adapter's directory holds one of them"
            )
        record = read_record(metadata)
        if record:
            record.refuse_changed(tensors, peft, directory)
        refuse_not_finite(tensors)
        return cls(directory=directory, peft=peft, tensors=tensors, record=record)


def refuse_not_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise an AdapterError with the list of all keys that hold a NaN or an infinity."""
    floating = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    wrong = [f"'{key}'" for key, tensor in floating.items() if not torch.isfinite(tensor.float()).all()]
    if wrong:
        raise AdapterError(
            f"the adapter holds values that are not finite, in {first_few(wrong, 10)}: use an earlier one"
        )


def refuse_meta(model: nn.Module, why: str = "would drop what is loaded") -> None:
    """Raise an AdapterError for a model whose tensors have no values yet."""
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise AdapterError(f"the model is on the meta device and {why}: give it its weights first")


def load_files(
    model: nn.Module,
    files: AdapterFiles,
    *,
    read: Read | None = None,
    make_real: Callable[[nn.Module], None] | None = None,
    allow_other_base: bool = False,
    alphas: Mapping[str, float] | None = None,
) -> InjectionReport:
    """Resolve, inject and fill; the caller checks W0's fingerprint. After an error the model is unchanged.

    For a model on the meta device `read` reads W0's tensor with a name, and `make_real` allocates the adapter's memory.
    """
    contents = resolve(files, model, read, allow_other_base=allow_other_base)
    refuse_other_targets(contents, model)
    return inject_and_fill(
        model,
        f"the adapter in {files.directory}",
        lambda: config_for(contents, files.record, model, alphas or {}),
        lambda: from_peft(model, contents.tensors, lambda name: token_ids(contents.peft, name)),
        make_real,
    )


def inject_and_fill(
    model: nn.Module,
    source: str,
    config: Callable[[], LoRAConfig],
    tensors: Callable[[], Mapping[str, Tensor]],
    make_real: Callable[[nn.Module], None] | None = None,
) -> InjectionReport:
    """Inject the config that `config` returns and load the tensors that `tensors` returns, by names in the model.

    Factors that an init subtracts are in no file: they are computed from W0, unless it is on the meta device. After an
    error the model is plain again and trains what it did before.
    """
    trained_before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_plain = not any(isinstance(module, Grafted) for module in model.modules())
    try:
        settings = config()
        run_init = make_real is None and from_weight.is_from_weight(settings.init)
        report = inject(model, settings, run_init=run_init, any_rank=True)
        if make_real is not None:
            make_real(model)
        subtracted = {k: t for k, t in adapter_tensors(model).items() if k.endswith(("lora_A0", "lora_B0"))}
        load_tensors(model, {**subtracted, **tensors()})
    except BaseException as error:
        if was_plain:
            remove(model)
            for parameter in trained_before:
                parameter.requires_grad_(True)
        if isinstance(error, ConfigError | TargetError):
            raise AdapterError(f"{source} does not fit this model: {error}") from error
        raise
    return report


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the adapter's tensors, by their names, into an adapted model; an AdapterError where they do not fit."""
    current = adapter_tensors(model)
    refuse_misfits(current, tensors)
    first: dict[int, str] = {}  # copies of tied modules are tied here, but not in PEFT: unequal ones are untied
    for key, tensor in list(current.items()):
        twin = first.setdefault(id(tensor), key)
        if twin != key and not torch.equal(tensors[key], tensors[twin]):
            module, _, name = key.rpartition(".")
            current[key] = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
            setattr(get_module(model, module), name, current[key])
    for key, tensor in current.items():
        tensor.data.copy_(tensors[key])


Number = TypeVar("Number", int, float)
Read = Callable[[str], Tensor | None]
"""A function of a name in the model that returns W0's tensor, None where there is none."""


@dataclass
class Contents:
    """What an adapter's files adapt and train, by names in the backbone; modules and bare parameters with their rank.

    `peft` is PEFT's config with every tied module that is saved in full, `tensors` are by canonical keys, without
    copies of W0.
    """

    peft: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)


def resolve(
    files: AdapterFiles, model: nn.Module, read: Read | None = None, *, allow_other_base: bool = False
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
    peft, by_key = files.peft, keys.canonical_keys(files.tensors, modules)
    if foreign := [key for key in by_key if not key.startswith(PREFIX)]:
        raise AdapterError(f"adapter keys must start with '{PREFIX}', got {first_few(foreign, 10)}")
    named = {key.removeprefix(PREFIX): tensor for key, tensor in by_key.items()}
    named = {name: tensor for name, tensor in named.items() if not keys.is_peft_copy(name, modules)}
    listed, others = list(peft.get("modules_to_save") or []), list[str]()
    # With `ensure_weight_tying` PEFT trains one copy for two tied modules, lists one of them and writes both.
    ties = bool(peft.get("ensure_weight_tying"))
    copies = [t for name, t in named.items() if ties and name.endswith(".weight") and keys.saved_module(name, listed)]
    contents = Contents({**peft, "modules_to_save": listed})
    for name, tensor in named.items():
        plain, wrappers = strip_wrappers(name, modules)
        end = next((end for end in (*keys.A_ENDS, *keys.OTHER_ENDS, keys.TOKENS_END) if f".{name}".endswith(end)), "")
        path = f".{name}".removesuffix(end).removeprefix(".")  # empty for the model itself
        if end in keys.A_ENDS:
            rank = tensor.shape[0] if tensor.dim() else 0
            path, depth = strip_wrappers(path, modules)
            parameters = modules[path]._parameters if path in modules else {}
            adapted = [key for key in parameters if matches(peft.get("target_parameters") or [], full_name(path, key))]
            if depth >= len(adapted):
                contents.modules[path] = rank
            elif (parameter := parameters[adapted[-1 - depth]]) is not None:
                stacked = parameter.shape[0] if parameter.dim() == 3 else 1
                contents.parameters[full_name(path, adapted[-1 - depth])] = rank // stacked
        elif end == keys.TOKENS_END:
            contents.tokens.append(path)
        elif not end and not keys.is_trained_bias(name, peft, modules):
            if plain in state and not keys.saved_module(plain, listed):
                if plain.endswith(".weight") and any(torch.equal(tensor, copy) for copy in copies):
                    listed.append(plain.removesuffix(".weight"))
                elif (here := read(plain) if read else state[plain]) is not None:
                    is_written = plain in tables or (wrappers > 0 and plain.endswith(".weight"))
                    is_copy = torch.equal(tensor.to(here.dtype), here.cpu())
                    if is_written and not is_copy and not allow_other_base:
                        raise AdapterError(
                            f"the adapter holds a weight of '{plain.removesuffix('.weight')}' that is not this model's:"
                            " load the base that it was made on (resized as it was there), or pass"
                            " allow_other_base=True to keep this model's"
                        )
                    if is_copy or is_written:
                        continue
            others.append(name)
        contents.tensors[PREFIX + name] = tensor
    if unknown := [name for name in (*contents.modules, *contents.tokens) if name not in modules]:
        hint = _fitting_hint(unknown, modules) or did_you_mean(unknown[0], modules)
        missing = first_few([f"'{name}'" for name in unknown], 10)
        raise AdapterError(f"the model has no module {missing}: {len(unknown)} of the adapter's are missing{hint}")
    contents.saved = _saved_modules(others, listed, modules)
    return contents


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


def _saved_modules(names: list[str], listed: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Full names of the modules saved in full: the config lists them, and the keys are their tensors."""
    holders = {name: keys.saved_module(name, listed) for name in names}
    if strangers := [key for key, holder in holders.items() if holder is None]:
        raise AdapterError(
            f"the adapter does not fit this model ({len(strangers)} keys): left over {first_few(strangers, 10)}, which"
            f" are neither A or B nor in a module that modules_to_save lists ({', '.join(listed) or 'none'})"
        )
    for entry in listed:
        for name in [entry] if entry in modules else [n for n in modules if n.endswith(f".{entry}")]:
            if modules[name].state_dict() and not any(key.startswith(f"{name}.") for key in holders):
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
    rslora = bool(peft.get("use_rslora"))
    alphas = find_alphas(peft, {name: _peft_name(name, model) for name in ranks}, ranks, alphas_in_doubt)
    dropouts, slices = (record.dropouts, record.slices) if record else ({}, {})
    if record is None:
        modules = {name: get_module(model, name) for name in contents.modules}
        if unlike := [name for name, module in modules.items() if is_conv_unlike_peft(module)]:
            raise AdapterError(
                f"PEFT pads the update of {first_few([repr(name) for name in unlike])} with zeros and does not dilate"
                " it, whatever the convolution does: no weight of W0's shape holds what it trained; train it anew here"
            )
        if twice := [name for name, module in modules.items() if isinstance(module, OutProj)]:
            warn(
                f"PEFT (0.21.2) trains with twice the update in {first_few([repr(name) for name in twice])} (its issue"
                " 3774), here it counts once: double these layers' lora_B for what PEFT computes"
            )
    else:
        # The zeros of a projection that is not adapted are not in the record.
        ranks = {name: rank for name, rank in ranks.items() if name in record.settings}
        for name, rank in ranks.items():
            written = alphas[name] / (math.sqrt(rank) if rslora else rank)
            ranks[name], alphas[name], scale = record.settings[name]
            if not math.isclose(written, scale, rel_tol=1e-9):
                raise AdapterError(f"{CONFIG} was changed since it was saved: its ranks or alphas")
    return exact_config(
        ranks,
        {name: alphas[name] for name in ranks},
        slices,
        target_parameters=[*contents.parameters] or None,
        dropout=float(peft.get("lora_dropout") or 0.0),
        dropout_pattern={exact_pattern(name): p for name, p in dropouts.items() if name in ranks},
        trainable_token_indices={name: [*token_ids(peft, name)] for name in contents.tokens} or None,
        modules_to_save=contents.saved or None,
        use_rslora=rslora,
        use_dora=bool(peft.get("use_dora")),
        init=subtracted_init(peft),
        bias=peft.get("bias") or "none",
        lora_bias=bool(peft.get("lora_bias")),
    )


def exact_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    slices: Mapping[str, Any],
    *,
    target_parameters: list[str] | None = None,
    **others: Any,
) -> LoRAConfig:
    """The config that adapts these modules and bare parameters alone; `others` are its other fields."""
    modules = [name for name in ranks if name not in (target_parameters or ())]
    r, rank_pattern = exact_patterns(ranks, 8)
    alpha, alpha_pattern = exact_patterns(alphas, 8.0)
    return LoRAConfig(
        r=r,
        alpha=alpha,
        # In a group, so that a module with the name of a preset, such as `attention`, is not taken for the preset.
        target_modules=f"(?:{'|'.join(map(re.escape, modules))})" if modules else [],
        target_parameters=target_parameters,
        slices={exact_pattern(name): spec for name, spec in slices.items() if name in modules},
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        **others,
    )


def exact_patterns(values: Mapping[str, Number], default: Number) -> tuple[Number, dict[str, Number]]:
    """The first module's value, `default` where there is none, and a pattern for each module with another."""
    first = next(iter(values.values()), default)
    return first, {exact_pattern(name): value for name, value in values.items() if value != first}


def exact_pattern(name: str) -> str:
    """The pattern that matches this module alone."""
    return f"^{re.escape(name)}$"


def _peft_name(name: str, model: nn.Module) -> str:
    """The name by which PEFT looks up a module's rank and alpha."""
    parent, _, last = name.rpartition(".")
    is_in_attention = last == "out_proj" and isinstance(get_module(model, parent), nn.MultiheadAttention)
    return parent if is_in_attention else name
