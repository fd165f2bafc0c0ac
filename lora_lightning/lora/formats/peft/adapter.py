"""PEFT directories, out and in: `adapter_model.safetensors` and `adapter_config.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError, ConfigError, TargetError
from lora_lightning.lora.formats.atomic_dir import write_together
from lora_lightning.lora.formats.misfits import refuse_misfits, refuse_not_finite
from lora_lightning.lora.formats.peft.config import CONFIG, WEIGHTS, read_config, token_ids
from lora_lightning.lora.formats.peft.copies import without_base_copies
from lora_lightning.lora.formats.peft.keys import as_written, read_weights
from lora_lightning.lora.formats.peft.limits import warn_of_peft_limits
from lora_lightning.lora.formats.peft.packing import PREFIX, Packed, our_tensors, packed_layers, peft_tensors
from lora_lightning.lora.formats.peft.task import task_for_peft
from lora_lightning.lora.formats.peft.ties import with_ties
from lora_lightning.lora.formats.peft.unpacking import check_targets, contents, our_config
from lora_lightning.lora.formats.peft.wrappers import is_peft_copy
from lora_lightning.lora.formats.peft.write import other_dropouts, own_name, peft_config_of
from lora_lightning.lora.formats.provenance import Record, check_base, read_record, write_record
from lora_lightning.lora.formats.tensor_files import file_content
from lora_lightning.lora.formats.vllm import for_vllm, vllm_targets
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.init import from_weight as starts
from lora_lightning.lora.inject import adapted_layers, inject, remove
from lora_lightning.lora.layers import Grafted
from lora_lightning.lora.report import InjectionReport


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    serving: Literal["vllm"] | None = None,
) -> Path:
    """Write the adapter of `model` as a directory that PEFT opens on the plain backbone. Same adapter, same bytes.

    Ranks, alphas and module names are written out in full, so that nothing depends on the order of patterns.
    The weights' metadata hold the fingerprint of W0. What PEFT would read otherwise is said in an `AdapterWarning`
    with the modules' names; `load_adapter` reads all of it.

    Args:
        base_model_name_or_path: what PEFT's `Auto` classes should load as the backbone; a transformers
            model's own name is taken when left out.
        task_type: PEFT's name of the task, such as `SEQ_CLS`; left out, with a warning, where PEFT would then look
            for a trained head that this adapter does not bring.
        serving: `vllm` writes one rank and one alpha for all modules, which is what vLLM applies: patterns, rslora,
            slices and subtracted starts are folded into A and B, and what it cannot serve is refused.

    Raises:
        AdapterError: the model has no adapter, or its values are not finite or on the meta device, or vLLM cannot
            serve it, or the directory cannot be written, which is then as it was.
    """
    model = uncompiled(model)
    refuse_meta(model, "has no values to save")
    packed = packed_layers(model)
    if not all(p.peft_name for p in packed):
        raise AdapterError("the model itself is the adapted layer and has no name: wrap it, as in nn.Sequential(layer)")
    if serving not in (None, "vllm"):
        raise AdapterError(f"serving must be 'vllm' or left out, got {serving!r}")
    if serving == "vllm":
        packed = for_vllm(model, packed)
    tensors = peft_tensors(model, packed)
    if not tensors:
        raise AdapterError("nothing to save: this model has no adapter; call inject(model, config) first")
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"'{key}' is not finite: training diverged; save an earlier checkpoint")
    if serving is None:
        warn_of_peft_limits(model, packed)
    config = adapter_config(model, packed, base_model_name_or_path, task_type)
    if serving == "vllm":
        config["target_modules"] = vllm_targets(model, packed)
        config.pop("exclude_modules", None)
    directory = Path(directory)
    record = write_record(model, packed, tensors, other_dropouts(packed), config)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_together(directory, {WEIGHTS: file_content(tensors, record), CONFIG: text.encode()})
    return directory


def adapter_config(
    model: nn.Module, packed: list[Packed], base_model_name_or_path: str | None, task_type: str | None
) -> dict[str, Any]:
    """PEFT's config of an adapter, in full."""
    config = peft_config_of(model, packed)
    config["base_model_name_or_path"] = base_model_name_or_path or own_name(model)
    config["task_type"] = task_for_peft(model, task_type)
    return config


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    allow_other_base: bool = False,
    alphas: Mapping[str, float] | None = None,
) -> InjectionReport:
    """Inject what a PEFT directory describes into a plain `model` and load its weights.

    An old `adapter_model.bin` is unpickled as tensors and nothing else. Ranks come from the tensors, alphas from PEFT's
    patterns. An adapter without a fingerprint of W0, as PEFT writes it, is loaded with a notice.

    Args:
        alphas: by full module name, where entries of PEFT's `alpha_pattern` contradict each other about a module: its
            file does not say which was in force in training, and the error that asks for this names the modules.

    Raises:
        AdapterError: a file is missing, torn or was changed since; a key is missing, left over or wrongly shaped;
            a setting has no counterpart here; the model has no module that the adapter names; the adapter was
            made on another W0 and `allow_other_base` is False. The model is then as before.
        LoRAError: the model is adapted already.
    """
    directory, model = Path(directory), uncompiled(model)
    peft, tensors, record = read_directory(directory)
    refuse_meta(model)
    check_base(record, model, allow_other_base=allow_other_base, replaced=peft.get("modules_to_save") or ())
    peft, tensors = of_model(peft, tensors, model)
    tensors = without_base_copies(tensors, peft, model, allow_other_base=allow_other_base)
    found = contents(tensors, peft, model)
    check_targets(peft, found, model)
    with plain_again_on_error(model):
        try:
            config = our_config(peft, found, record, model, alphas or {})
            report = inject(model, config, start=starts.from_weight(config.init), any_rank=True)
        except (ConfigError, TargetError) as error:
            raise AdapterError(f"the adapter in {directory} does not fit this model: {error}") from error
        ours = our_tensors(model, tensors, lambda name: token_ids(peft, name))
        load_tensors(model, {**_first_factors(model), **ours})
    return report


def read_directory(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor], Record | None]:
    """PEFT's config, the tensors as they lie in the file, and our record where it has one.

    Raises:
        AdapterError: a file is missing, torn, was changed since it was saved, or holds numbers that are not finite.
    """
    peft = read_config(directory / CONFIG)
    file, tensors, metadata = read_weights(directory)
    record = read_record(metadata)
    if record and not record.holds(tensors):
        raise AdapterError(f"{file} was changed since it was saved: export or download it again")
    if record:
        record.refuse_changed(peft, directory / CONFIG)
    refuse_not_finite(tensors)
    return peft, tensors, record


def of_model(
    peft: dict[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors under the names that `model` has for its modules, ties told."""
    modules = dict(model.named_modules(remove_duplicate=False))
    written = as_written(tensors, model).items()
    named = {key: tensor for key, tensor in written if not is_peft_copy(key.removeprefix(PREFIX), modules)}
    return with_ties(peft, named, model), named


@contextmanager
def plain_again_on_error(model: nn.Module) -> Iterator[None]:
    """Give back the plain model, with what trained before, where loading an adapter into it fails."""
    trained_before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_plain = not any(isinstance(module, Grafted) for module in model.modules())
    try:
        yield
    except BaseException:
        if was_plain:
            remove(model)
            for parameter in trained_before:
                parameter.requires_grad_(True)
        raise


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the adapter's tensors, by their keys in `model.state_dict()`, into an adapted model.

    Raises:
        AdapterError: with the list of all keys that are missing, left over or wrongly shaped. Nothing is loaded then.
    """
    own = adapter_tensors(model)
    refuse_misfits(own, tensors)
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


def uncompiled(model: nn.Module) -> nn.Module:
    """The model in `torch.compile(model)`, a wrapper that renames every key; any other model is itself."""
    return model._modules.get("_orig_mod") or model


def refuse_meta(model: nn.Module, why: str = "would drop what is loaded") -> None:
    """Raise an AdapterError for a model whose tensors have no values yet."""
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise AdapterError(f"the model is on the meta device and {why}: give it its weights first")


def _first_factors(model: nn.Module) -> dict[str, Tensor]:
    """A0 and B0 by their keys: no file holds them."""
    layers = adapted_layers(model)
    return {f"{n}.{o}": t for n, m in layers for o, t in m.lora_tensors().items() if o in {"lora_A0", "lora_B0"}}
