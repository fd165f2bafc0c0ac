"""PEFT directories, out and in: `adapter_model.safetensors` and `adapter_config.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.adapter import adapter_tensors
from lora_lightning.lora.errors import AdapterError, did_you_mean
from lora_lightning.lora.fingerprint import Fingerprint, fingerprint
from lora_lightning.lora.inject import inject, remove, saved_copies, token_rows
from lora_lightning.lora.layers import LoRAConv1D, LoRAParameter
from lora_lightning.lora.packing import Packed, fillers, in_order, packed_layers, peft_alpha, token_key
from lora_lightning.lora.report import InjectionReport
from lora_lightning.lora.storage import read_tensors, write_bytes, write_tensors
from lora_lightning.lora.unpacking import (
    BASE_END,
    PREFIX,
    PROVENANCE,
    Contents,
    check_targets,
    contents,
    our_config,
    provenance,
    some,
    token_ids,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# Fields of PEFT's config that change the arithmetic and have no counterpart here: anything but these values is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}


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
    packed = packed_layers(model)
    tensors = _peft_tensors(model, packed)
    if not tensors:
        raise AdapterError("nothing to save: this model has no adapter; call inject(model, config) first")
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"'{key}' is not finite: training diverged; save an earlier checkpoint")
    config = _peft_config(model, packed)
    config["base_model_name_or_path"] = base_model_name_or_path or _own_name(model)
    config["task_type"] = task_type
    record = {
        "version": version("lora_lightning"),
        "base": json.loads(fingerprint(model).to_json()),
        "modules": {p.name: [p.layer.lora_settings.r, p.layer.lora_settings.alpha, p.scale] for p in packed},
        "slices": {p.name: spec.to_spec() for p in packed if (spec := p.layer.lora_settings.slices)},
    }
    directory = Path(directory)
    metadata = {"format": "pt", PROVENANCE: json.dumps(record, sort_keys=True)}
    write_tensors(directory / WEIGHTS, tensors, metadata)
    write_bytes(directory / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    return directory


def load_adapter(model: nn.Module, directory: str | Path, *, allow_other_base: bool = False) -> InjectionReport:
    """Inject what a PEFT directory describes into a plain `model` and load its weights.

    Ranks come from the tensors, alphas as PEFT resolves its patterns.

    Raises:
        AdapterError: a file is missing or torn; a key is missing, left over or wrongly shaped; a setting has
            no counterpart here; the adapter was made on another W0 and `allow_other_base` is False. The model
            is then plain as before.
        TargetError: the model has no module that the adapter names.
    """
    directory = Path(directory)
    peft = read_config(directory / CONFIG)
    tensors, metadata = read_tensors(directory / WEIGHTS)
    _refuse_unknown_settings(peft)
    record = provenance(metadata)
    if record and not allow_other_base:
        _check_base(model, record)
    found = contents(tensors, peft, model)
    if not allow_other_base:
        _check_matrices(model, found)
    check_targets(peft, found, model)
    report = inject(model, our_config(peft, found, record, model))
    try:
        load_tensors(model, _our_tensors(model, tensors, peft, found))
    except AdapterError:
        remove(model)
        raise
    return report


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the adapter's tensors, by their keys in `model.state_dict()`, into an adapted model.

    Raises:
        AdapterError: with the list of all keys that are missing, left over or wrongly shaped. Nothing is loaded then.
    """
    own = adapter_tensors(model)
    refuse_misfits({key: tensor.shape for key, tensor in own.items()}, tensors)
    for key, tensor in own.items():
        tensor.data.copy_(tensors[key])


def read_config(path: Path) -> dict[str, Any]:
    """A PEFT config of type LORA.

    Raises:
        AdapterError: it is missing, no JSON, or of another method.
    """
    if not path.is_file():
        raise AdapterError(f"no file {path}: an adapter directory holds {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterError(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict) or str(config.get("peft_type")).upper() != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"{path} must describe a LoRA adapter (peft_type LORA), got {got!r}")
    return config


def _peft_tensors(model: nn.Module, packed: list[Packed]) -> dict[str, Tensor]:
    """Everything that a file of this adapter holds, by PEFT's keys."""
    tensors = fillers(packed)
    for p in packed:
        tensors |= p.tensors()
    for name, embedding in token_rows(model):
        tensors[token_key(name)] = embedding.lora_tokens
    copies = {k: t for k, t in adapter_tensors(model).items() if ".lora_copy." in f".{k}"}
    tensors |= {key.replace("lora_copy.", "", 1): tensor for key, tensor in copies.items()}
    return {PREFIX + key: tensor for key, tensor in tensors.items()}


def _our_tensors(model: nn.Module, file: dict[str, Tensor], peft: dict[str, Any], found: Contents) -> dict[str, Tensor]:
    """The file's tensors by our keys.

    Raises:
        AdapterError: with the list of all keys that are missing, left over or wrongly shaped.
    """
    packed = packed_layers(model)
    expected = {key: tensor.shape for key, tensor in _peft_tensors(model, packed).items()}
    optional = {PREFIX + key for key in fillers(packed)} - set(file)
    bases = {f"{PREFIX}{name}{BASE_END}" for name in found.bases}
    refuse_misfits({k: v for k, v in expected.items() if k not in optional}, file, ignore=bases)
    file = {key.removeprefix(PREFIX): tensor for key, tensor in file.items()}
    ours: dict[str, Tensor] = {}
    for p in packed:
        ours |= p.unpack(file)
    for name, _ in token_rows(model):
        ours[f"{name}.lora_tokens".removeprefix(".")] = in_order(file[token_key(name)], token_ids(peft, name))
    for key in adapter_tensors(model):
        if ".lora_copy." in f".{key}":
            ours[key] = file[key.replace("lora_copy.", "", 1)]
    return ours


def refuse_misfits(
    expected: Mapping[str, torch.Size], tensors: Mapping[str, Tensor], ignore: Collection[str] = ()
) -> None:
    """Raise an AdapterError with the list of all keys that are missing, left over or wrongly shaped."""
    problems = [f"missing '{key}'" for key in expected if key not in tensors]
    left_over = [key for key in tensors if key not in expected and key not in ignore]
    problems += [f"left over '{key}'{did_you_mean(key, expected)}" for key in left_over]
    problems += [
        f"'{key}' has shape {tuple(tensors[key].shape)}, expected {tuple(shape)}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    ]
    if problems:
        raise AdapterError(f"the adapter does not fit this model ({len(problems)} keys): {some(problems)}")


def _peft_config(model: nn.Module, packed: list[Packed]) -> dict[str, Any]:
    rslora = any(p.layer.lora_settings.scale != p.layer.lora_settings.alpha / p.layer.lora_settings.r for p in packed)
    parameters = [p.peft_name for p in packed if isinstance(p.layer, LoRAParameter)]
    ranks = {p.peft_name: p.rank for p in packed}
    alphas = {p.peft_name: peft_alpha(p, rslora) for p in packed}
    r, alpha = next(iter(ranks.values()), 8), next(iter(alphas.values()), 16)
    tokens = {name: module.lora_token_ids.tolist() for name, module in token_rows(model)}
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": _number(alpha),
        "lora_dropout": packed[0].layer.lora_settings.dropout if packed else 0.0,
        "target_modules": _target_modules([name for name in ranks if name not in parameters], model),
        "target_parameters": parameters or None,
        "trainable_token_indices": tokens or None,
        "rank_pattern": {f"^{re.escape(n)}$": rank for n, rank in ranks.items() if rank != r},
        "alpha_pattern": {f"^{re.escape(n)}$": _number(a) for n, a in alphas.items() if a != alpha},
        "modules_to_save": [name for name, _ in saved_copies(model)] or None,
        "use_rslora": rslora,
        "init_lora_weights": True,
        "bias": "none",
        # PEFT refuses it beside bare parameters, and sets it for Conv1D by itself there.
        "fan_in_fan_out": any(isinstance(p.layer, LoRAConv1D) for p in packed) and not parameters,
        "use_dora": False,
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


def _refuse_unknown_settings(peft: dict[str, Any]) -> None:
    for name, neutral in NEUTRAL.items():
        if name in peft and peft[name] not in neutral:
            raise AdapterError(f"the adapter's setting {name}={peft[name]!r} has no counterpart here yet")


def _check_base(model: nn.Module, record: dict[str, Any]) -> None:
    try:
        made_on = Fingerprint.from_json(json.dumps(record["base"]))
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"the adapter's record of its base cannot be read ({error})") from error
    refuse_other_base(made_on, fingerprint(model))


def _check_matrices(model: nn.Module, found: Contents) -> None:
    """PEFT writes the whole matrix of an adapted embedding along: it must be the one that is here."""
    for name, matrix in found.bases.items():
        here = model.get_submodule(name).get_parameter("weight")
        if matrix.shape != here.shape or not torch.equal(matrix.to(here), here):
            raise AdapterError(
                f"the adapter holds a weight of '{name}' that is not this model's: load the base that it was made on"
                f" (resized as it was there), or pass allow_other_base=True to keep this model's"
            )


def refuse_other_base(made_on: Fingerprint, here: Fingerprint) -> None:
    """Raise where W0 is another than the adapter's, naming the tensors that differ."""
    different = made_on.differences(here)
    # A head that the adapter brings whole is in one of the two only.
    different = [n for n in different if n in made_on.tensors]
    if different:
        raise AdapterError(
            f"the adapter was made on another base: W0 {made_on.short} there, {here.short} here;"
            f" {len(different)} of {len(made_on.tensors)} tensors differ, first {some(different)}."
            f" Load the base that it was made on, or pass allow_other_base=True"
        )
