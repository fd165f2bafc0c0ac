"""Start training from the adapter of an earlier run.

The paper's MRPC, RTE and STS-B runs start from its MNLI adapter (arXiv 2106.09685, appendix D.1). A and B are loaded
into the new adapter; a head that trains in full and has another shape for the new task keeps its own init.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.formats.peft.config import subtracted_init, token_ids
from lora_lightning.lora.formats.peft.keys import PREFIX, copy_key
from lora_lightning.lora.formats.peft.layout import from_peft
from lora_lightning.lora.formats.peft.load import AdapterFiles, config_for, load_tensors, resolve
from lora_lightning.lora.formats.provenance import check_base, refuse_other_base
from lora_lightning.lora.frozen.fingerprint import Fingerprint, fingerprint
from lora_lightning.lora.frozen.tensors import adapter_tensors, full_name, refuse_misfits
from lora_lightning.lora.inject import adapted_layers, modules_of_kind
from lora_lightning.lora.layers import SavedCopy, TokenRows
from lora_lightning.lora.layers.trained.module_copy import COPY
from lora_lightning.lora.targets.patterns import by_pattern


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What was loaded from the earlier adapter."""

    tensors: int
    own_start: dict[str, str]
    """Modules trained in full that keep their own init, and why."""

    def __str__(self) -> str:
        left = "; ".join(f"'{name}' keeps its own start: {why}" for name, why in self.own_start.items())
        return f"{self.tensors} tensors taken over" + (f"; {left}" if left else "")


def start_from_directory(model: nn.Module, directory: Path, *, allow_other_base: bool = False) -> WarmStart:
    """Load a PEFT directory into the adapter of `model`; an AdapterError, and nothing loaded, where they differ."""
    files = AdapterFiles.read(directory)
    if (init := subtracted_init(files.peft)) != "gaussian":
        raise AdapterError(f"the adapter in {directory} counts on the start '{init}': start from its run's checkpoint")
    if with_init := [name for name, layer in adapted_layers(model) if layer.lora_A0 is not None]:
        raise AdapterError(
            f"lora.init subtracts a start, in '{with_init[0]}', that PEFT's format does not have: leave lora.init out,"
            " or start from a checkpoint of a run with the same"
        )
    # Without what this run trains in full, which may be more than the earlier run did.
    check_base(files.record, model, allow_other_base=allow_other_base, replaced=_head_names(model))
    contents = resolve(files, model, allow_other_base=allow_other_base)
    trained = config_for(contents, files.record, model, {})
    keys = {key: PREFIX + copy_key(key) for key in adapter_tensors(model)}
    tensors, left = _keep_own_heads(model, contents.tensors, keys)
    ours = from_peft(model, tensors, lambda name: token_ids(files.peft, name))
    for path, layer in adapted_layers(model):
        name, parts = layer.lora_name(path), layer.lora_settings.slices
        there, here = files.record and files.record.slices.get(name), parts and parts.to_spec()
        if there != here:
            raise AdapterError(f"the adapter was trained on the parts {there} of '{name}', this run says {here}")
    for name, embedding in modules_of_kind(model, TokenRows):
        if sorted(token_ids(files.peft, name)) != embedding.lora_token_ids.tolist():
            raise AdapterError(f"the adapter trains other tokens of '{name}' than lora.trainable_token_indices names")
    return _fill(model, ours, trained, left)


def start_from_state(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    trained: LoRAConfig,
    config: LoRAConfig,
    base: Fingerprint,
    *,
    allow_other_base: bool = False,
) -> WarmStart:
    """Load a checkpoint's tensors, by their names in the model, into the adapter that the model already has.

    Args:
        trained, config: the settings of the checkpoint, and those that `model` was injected with.
        base: the fingerprint of the W0 that the checkpoint was trained on.

    Raises:
        AdapterError: another base, or tensors, a scale, a part or a token row that differ; nothing is loaded then.
    """
    refuse_other_base(base, fingerprint(model), allow_other_base=allow_other_base, replaced=_head_names(model))
    tensors, left = _keep_own_heads(model, tensors, {key: key for key in adapter_tensors(model)})
    has_slices = trained.slices or any(layer.lora_settings.slices for _, layer in adapted_layers(model))
    for name in ["trainable_token_indices", "slices", *(["target_modules"] if has_slices else [])]:
        there, here = getattr(trained, name), getattr(config, name)
        if there != here:
            raise AdapterError(f"the adapter was trained with lora.{name}={there!r}, this run says {here!r}")
    refuse_misfits(adapter_tensors(model), tensors)
    return _fill(model, tensors, trained, left)


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], trained: LoRAConfig, left: dict[str, str]) -> WarmStart:
    """Load the tensors; raise an AdapterError where a layer's s differs, which would change the update."""
    for path, layer in adapted_layers(model):
        name, here = layer.lora_name(path), layer.lora_settings
        alpha = by_pattern("alpha_pattern", trained.alpha_pattern, [name], trained.scaling_alpha)
        there = trained.scale(here.r, alpha)
        if not math.isclose(there, here.scale, rel_tol=1e-9):
            ours = f"this run's is {here.scale:g}: set lora.alpha (and use_rslora) as it was there"
            raise AdapterError(f"the adapter was trained with a scale of {there:g} in '{name}', {ours}")
    load_tensors(model, tensors)
    heads = tuple(f"{full_name(name, COPY)}." for name in left)
    return WarmStart(tensors=sum(not key.startswith(heads) for key in tensors), own_start=left)


def _head_names(model: nn.Module) -> list[str]:
    return [name for name, _ in modules_of_kind(model, SavedCopy)]


def _keep_own_heads(
    model: nn.Module, tensors: Mapping[str, Tensor], keys: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors, with this model's for each head that the file lacks or has in another shape, and why by head.

    `keys` has the file's key for each name in the model. A head of which the file has only a part is not replaced; the
    caller refuses it.
    """
    current, filled, left = adapter_tensors(model), dict(tensors), dict[str, str]()
    for name in _head_names(model):
        head = {keys[key]: tensor for key, tensor in current.items() if key.startswith(f"{full_name(name, COPY)}.")}
        others = [(tensors[k].shape, t.shape) for k, t in head.items() if k in tensors and tensors[k].shape != t.shape]
        if not head.keys() & tensors.keys():
            left[name] = "the adapter brings none"
        elif others:
            left[name] = f"{tuple(others[0][0])} in the adapter, {tuple(others[0][1])} here"
        else:
            continue
        filled = {**{key: tensor for key, tensor in filled.items() if key not in head}, **head}
    return filled, left
