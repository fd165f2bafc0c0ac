"""PEFT directories, out and in: `adapter_model.safetensors` and `adapter_config.json`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora import starts
from lora_lightning.lora.adapter import adapter_tensors
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import AdapterError, ConfigError, TargetError, did_you_mean
from lora_lightning.lora.fingerprint import Fingerprint, fingerprint, of_tensors
from lora_lightning.lora.inject import adapted_layers, inject, remove, saved_copies, trained_biases
from lora_lightning.lora.layers import kind_of
from lora_lightning.lora.peft_config import CONFIG, WEIGHTS, holder, peft_adapts, peft_pattern, read_config
from lora_lightning.lora.peft_options import (
    common_dropout,
    exported_ranks,
    exported_tensors,
    first_factors,
    is_peft_copy,
    is_trained_bias,
    other_dropouts,
    start_in_file,
    uses_rslora,
)
from lora_lightning.lora.report import InjectionReport
from lora_lightning.lora.storage import read_tensors, write_bytes, write_tensors

PREFIX = "base_model.model."
PROVENANCE = "lora_lightning"


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> Path:
    """Write the adapter of `model` as a directory that PEFT opens on the plain backbone. Same adapter, same bytes.

    Ranks, alphas and module names are written out in full, so that nothing depends on the order of patterns.
    The weights' metadata hold the fingerprint of W0.

    Args:
        base_model_name_or_path: what PEFT's `Auto` classes should load as the backbone; a transformers
            model's own name is taken when left out.
        task_type: PEFT's name of the task, such as `SEQ_CLS`.

    Raises:
        AdapterError: the model has no adapter, or its values are not finite.
    """
    model = model._modules.get("_orig_mod") or model  # torch.compile(model) is a wrapper that renames every key
    layers, saved = adapted_layers(model), saved_copies(model)
    if not layers and not saved:
        raise AdapterError("nothing to save: this model has no adapter; call inject(model, config) first")
    if not all(name for name, _ in layers):
        raise AdapterError("the model itself is the adapted layer and has no name: wrap it, as in nn.Sequential(layer)")
    adapted = {name for name, _ in layers}
    tensors = {_peft_key(name, adapted): tensor for name, tensor in exported_tensors(model).items()}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"'{key}' is not finite: training diverged; save an earlier checkpoint")
    config = _peft_config(model)
    config["base_model_name_or_path"] = base_model_name_or_path or _own_name(model)
    config["task_type"] = task_type
    provenance = {
        "version": version("lora_lightning"),
        "base": json.loads(fingerprint(model).to_json()),
        "adapter": of_tensors(tensors).digest,
        "settings": _settings(model),
        "dropouts": other_dropouts(model),
    }
    directory = Path(directory)
    metadata = {"format": "pt", PROVENANCE: json.dumps(provenance, sort_keys=True)}
    write_tensors(directory / WEIGHTS, tensors, metadata)
    write_bytes(directory / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    return directory


def load_adapter(model: nn.Module, directory: str | Path, *, allow_other_base: bool = False) -> InjectionReport:
    """Inject what a PEFT directory describes into a plain `model` and load its weights.

    Ranks come from the tensors, alphas as PEFT resolves its patterns.

    Raises:
        AdapterError: a file is missing, torn or was changed since; a key is missing, left over or wrongly shaped;
            a setting has no counterpart here; the model has no module that the adapter names; the adapter was
            made on another W0 and `allow_other_base` is False. The model is then as before.
        LoRAError: the model is adapted already.
    """
    directory = Path(directory)
    peft = read_config(directory / CONFIG)
    tensors, metadata = read_tensors(directory / WEIGHTS)
    _refuse_meta(model)
    record = _record(metadata)
    if record and record["adapter"] != of_tensors(tensors).digest:
        raise AdapterError(f"{directory / WEIGHTS} was changed since it was saved: export or download it again")
    if record and not allow_other_base:
        refuse_other_base(Fingerprint.from_json(json.dumps(record["base"])), fingerprint(model))
    tensors = {k: t for k, t in tensors.items() if not is_peft_copy(k)}
    tensors = _without_base_copies(tensors, peft, model)
    modules, saved = _split_keys(tensors, model, peft)
    _check_targets(peft, modules, model)
    trained_before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        config = _our_config(peft, modules, saved, record["dropouts"] if record else {})
        report = inject(model, config, start=starts.from_weight(config.init), any_rank=True)
    except (ConfigError, TargetError) as error:
        raise AdapterError(f"the adapter in {directory} does not fit this model: {error}") from error
    try:
        ours = {_our_key(key, saved): tensor for key, tensor in tensors.items()}
        load_tensors(model, {**first_factors(model), **ours})
        if record and record["settings"] != _settings(model):
            raise AdapterError(f"{directory / CONFIG} was changed since it was saved: its ranks or alphas")
    except BaseException:
        remove(model)
        for parameter in trained_before:
            parameter.requires_grad_(True)
        raise
    return report


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the adapter's tensors, by their keys in `model.state_dict()`, into an adapted model.

    Raises:
        AdapterError: with the list of all keys that are missing, left over or wrongly shaped. Nothing is loaded then.
    """
    own = adapter_tensors(model)
    problems = [f"missing '{key}'" for key in own if key not in tensors]
    problems += [f"left over '{key}'{did_you_mean(key, own)}" for key in tensors if key not in own]
    problems += [
        f"'{key}' has shape {tuple(tensors[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    problems += [
        f"'{key}' holds {tensors[key].dtype}, expected {own[key].dtype}"
        for key in own
        if key in tensors and tensors[key].dtype.is_floating_point != own[key].is_floating_point()
    ]
    if problems:
        raise AdapterError(f"the adapter does not fit this model ({len(problems)} keys): {_some(problems)}")
    for key, tensor in _untied_where_unequal(model, own, tensors).items():
        tensor.data.copy_(tensors[key])


def _untied_where_unequal(model: nn.Module, own: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`own`, with a parameter of its own for each key whose values differ from those of the key that it is tied to.

    Copies of tied modules are tied here; PEFT trains them apart.
    """
    first: dict[int, str] = {}
    own = dict(own)
    for key, tensor in own.items():
        twin = first.setdefault(id(tensor), key)
        if twin != key and not torch.equal(tensors[key], tensors[twin]):
            module, _, name = key.rpartition(".")
            apart = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
            setattr(model.get_submodule(module), name, apart)
            own[key] = apart
    return own


# The last parts of our keys and of PEFT's.
_PEFT_NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_B_bias": "lora_B.bias"}
_OUR_NAMES = {f".{theirs}": f".{ours}" for ours, theirs in _PEFT_NAMES.items()}
_OUR_NAMES |= {".base_layer.bias": ".lora_trained_bias", ".lora_magnitude_vector": ".lora_magnitude_vector"}
_OUR_NAMES[".bias"] = ".lora_trained_bias"  # of a module without an adapter: last, for it ends others too


def _peft_key(key: str, adapted: set[str]) -> str:
    key = key.replace(".lora_copy.", ".")
    module, _, last = key.rpartition(".")
    if last == "lora_trained_bias":
        last = "base_layer.bias" if module in adapted else "bias"
    return f"{PREFIX}{module}.{_PEFT_NAMES.get(last, last)}"


def _our_key(key: str, saved: list[str]) -> str:
    key = key.removeprefix(PREFIX)
    for name in saved:
        if key.startswith(f"{name}."):
            return f"{name}.lora_copy.{key.removeprefix(f'{name}.')}"
    for theirs, ours in _OUR_NAMES.items():
        if key.endswith(theirs):
            return key.removesuffix(theirs) + ours
    return key


def _peft_config(model: nn.Module) -> dict[str, Any]:
    layers = adapted_layers(model)
    settings = {name: layer.lora_settings for name, layer in layers}
    ranks = exported_ranks(model)
    r, alpha = next(iter(ranks.values()), (8, 16.0))
    biased = [name for name, _ in trained_biases(model)]
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": _number(alpha),
        "lora_dropout": common_dropout(model),
        "target_modules": _target_modules([name for name, _ in layers], model),
        "rank_pattern": {f"^{re.escape(n)}$": rank for n, (rank, _) in ranks.items() if rank != r},
        "alpha_pattern": {f"^{re.escape(n)}$": _number(a) for n, (_, a) in ranks.items() if a != alpha},
        "modules_to_save": [name for name, _ in saved_copies(model)] or None,
        "use_rslora": uses_rslora(model),
        "init_lora_weights": True,
        "bias": "none" if not biased else "lora_only" if settings.keys() >= set(biased) else "all",
        "fan_in_fan_out": False,
        "use_dora": any(s.use_dora for s in settings.values()),
        "lora_bias": any(s.lora_bias for s in settings.values()),
        "inference_mode": True,
    }


def _target_modules(names: list[str], model: nn.Module) -> list[str] | str:
    """Full names; where one is also the dotted end of another module's name, one anchored regex instead."""
    everything = [name for name, _ in model.named_modules(remove_duplicate=False)]
    chosen = set(names)
    for other in everything:
        if other not in chosen and any(other.endswith(f".{name}") for name in names):
            return "|".join(re.escape(name) for name in names)
    return sorted(names)


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _own_name(model: nn.Module) -> str | None:
    """The hub name or path that a transformers model carries."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    return name or None


def _refuse_meta(model: nn.Module) -> None:
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise AdapterError("the model is on the meta device and would drop what is loaded: give it its weights first")


def _settings(model: nn.Module) -> dict[str, Any]:
    """By module, what its adapter computes with, as the file's factors are scaled."""
    root = math.sqrt if uses_rslora(model) else float
    return {name: [r, alpha, alpha / root(r)] for name, (r, alpha) in exported_ranks(model).items()}


def _record(metadata: dict[str, str]) -> dict[str, Any] | None:
    """What `save_adapter` wrote about the base and the adapter; None in a file of PEFT's own."""
    if PROVENANCE not in metadata:
        return None
    try:
        record: dict[str, Any] = json.loads(metadata[PROVENANCE])
        Fingerprint.from_json(json.dumps(record["base"]))
        found = {name: record[name] for name in ("base", "adapter", "settings")}
        return {**found, "dropouts": dict(record.get("dropouts", {}))}
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"the adapter's record of its base cannot be read ({error})") from error


def refuse_other_base(made_on: Fingerprint, here: Fingerprint) -> None:
    """Raise where W0 is another than the adapter's, naming the tensors that differ."""
    different = made_on.differences(here)
    # A head that the adapter brings whole is in one of the two only.
    different = [n for n in different if n in made_on.tensors]
    if different:
        raise AdapterError(
            f"the adapter was made on another base: W0 {made_on.short} there, {here.short} here;"
            f" {len(different)} of {len(made_on.tensors)} tensors differ, first {_some(different)}."
            f" Load the base that it was made on, or pass allow_other_base=True"
        )


def _split_keys(tensors: dict[str, Tensor], model: nn.Module, peft: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Adapted modules with their rank, and the modules saved in full, from the keys of the file."""
    strangers = [key for key in tensors if not key.startswith(PREFIX)]
    if strangers:
        raise AdapterError(f"adapter keys must start with '{PREFIX}', got {_some(strangers)}")
    modules: dict[str, int] = {}
    rest: list[str] = []
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(".lora_A.weight"):
            modules[name.removesuffix(".lora_A.weight")] = tensor.shape[0] if tensor.dim() else 0
        elif not (name.endswith(_OF_ADAPTER) or is_trained_bias(name, peft)):
            rest.append(name)
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    unknown = [name for name in modules if name not in known]
    if unknown:
        hint = did_you_mean(unknown[0], known)
        raise AdapterError(
            f"the model has no module '{unknown[0]}' ({len(unknown)} of the adapter's are missing){hint}"
        )
    return modules, _saved_modules(rest, peft.get("modules_to_save") or [], model)


def _without_base_copies(tensors: dict[str, Tensor], peft: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """PEFT writes W0 itself beside A and B of an output layer; where it is this model's own, it is dropped."""
    own, listed = model.state_dict(), peft.get("modules_to_save") or []

    def is_copy(key: str, tensor: Tensor) -> bool:
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        mine = own.get(name)
        if is_trained_bias(key.removeprefix(PREFIX), peft):
            return False
        if mine is None or mine.shape != tensor.shape or holder(name, listed):
            return False
        return torch.equal(tensor.to(mine.dtype), mine.cpu())

    return {key: tensor for key, tensor in tensors.items() if not is_copy(key, tensor)}


def _saved_modules(keys: list[str], listed: list[str], model: nn.Module) -> list[str]:
    """Full names of the modules saved in full: those that hold `keys` and that the config lists."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    holders = {key: holder(key, listed) for key in keys}
    strangers = [key for key, holder in holders.items() if holder is None]
    if strangers:
        raise AdapterError(
            f"the adapter does not fit this model ({len(strangers)} keys): left over {_some(strangers)}, which are"
            f" neither A or B nor in a module that modules_to_save lists ({', '.join(listed) or 'none'})"
        )
    for entry in listed:
        hits = [name for name in names if name == entry] or [name for name in names if name.endswith(f".{entry}")]
        bare = [n for n in hits if model.get_submodule(n).state_dict() and not any(k.startswith(f"{n}.") for k in keys)]
        if bare:
            raise AdapterError(f"{CONFIG} saves '{bare[0]}' in full and {WEIGHTS} has no tensors for it")
    return sorted({holder for holder in holders.values() if holder is not None})


_OF_ADAPTER = (".lora_B.weight", ".lora_B.bias", ".lora_magnitude_vector", ".base_layer.bias")


def _check_targets(peft: dict[str, Any], modules: dict[str, int], model: nn.Module) -> None:
    """Refuse where the config and the file's tensors name different modules."""
    targets = peft.get("target_modules")
    if not targets or targets == "all-linear":
        return  # the file's keys are all there is to go by
    saved = peft.get("modules_to_save") or []
    for name, module in model.named_modules():
        selected = peft_adapts(peft, targets, name)
        if name in modules and not selected:
            raise AdapterError(f"{WEIGHTS} has left over tensors for '{name}', which {CONFIG} does not adapt")
        if not selected or name in modules or kind_of(module) is None:
            continue
        if not any(re.match(rf"(^|.*\.){re.escape(m)}($|\..*)", name) for m in saved):
            raise AdapterError(f"{CONFIG} adapts '{name}' and {WEIGHTS} has no tensors for it")


def _our_config(
    peft: dict[str, Any], modules: dict[str, int], saved: list[str], dropouts: dict[str, float]
) -> LoRAConfig:
    alpha = float(peft.get("lora_alpha", 8))
    patterns = peft.get("alpha_pattern") or {}
    alphas = {name: float(peft_pattern(patterns, name, alpha)) for name in modules}
    r = int(peft.get("r", 8))
    return LoRAConfig(
        r=r,
        alpha=alpha,
        dropout=float(peft.get("lora_dropout") or 0.0),
        dropout_pattern={f"^{re.escape(n)}$": p for n, p in dropouts.items() if n in modules},
        target_modules="|".join(re.escape(name) for name in modules),
        modules_to_save=saved or None,
        rank_pattern={f"^{re.escape(n)}$": rank for n, rank in modules.items() if rank != r},
        alpha_pattern={f"^{re.escape(n)}$": a for n, a in alphas.items() if a != alpha},
        use_rslora=bool(peft.get("use_rslora")),
        use_dora=bool(peft.get("use_dora")),
        init=start_in_file(peft),
        bias=peft.get("bias") or "none",
        lora_bias=bool(peft.get("lora_bias")),
    )


def _some(items: list[str], limit: int = 4) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
