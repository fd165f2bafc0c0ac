"""Start training from the adapter of an earlier run.

The paper's MRPC, RTE and STS-B runs start from its MNLI adapter (arXiv 2106.09685, appendix D.1). A and B are taken
over whole, and W0 stays; a head that is trained in full and has another shape for the new task keeps its own start.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.formats.misfits import refuse_misfits
from lora_lightning.lora.formats.peft.adapter import load_tensors, of_model, read_directory
from lora_lightning.lora.formats.peft.config import start_in_file, token_ids
from lora_lightning.lora.formats.peft.copies import without_base_copies
from lora_lightning.lora.formats.peft.packing import PREFIX, Packed, copy_key, our_tensors, packed_layers
from lora_lightning.lora.formats.peft.patterns import trained_alphas
from lora_lightning.lora.formats.provenance import Record, refuse_other_base, warn_of_no_fingerprint
from lora_lightning.lora.frozen.fingerprint import Fingerprint, fingerprint
from lora_lightning.lora.frozen.tensors import adapter_tensors, joined
from lora_lightning.lora.inject import adapted_layers, grafted_modules
from lora_lightning.lora.layers import AdaptedLayer, SavedCopy, TokenRows
from lora_lightning.lora.layers.trained.module_copy import COPY
from lora_lightning.lora.targets.patterns import by_pattern


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What was taken over."""

    tensors: int
    """How many."""
    own_start: dict[str, str]
    """Modules trained in full that keep their own start, and why."""

    def __str__(self) -> str:
        left = "; ".join(f"'{name}' keeps its own start: {why}" for name, why in self.own_start.items())
        return f"{self.tensors} tensors taken over" + (f"; {left}" if left else "")


def start_from_directory(model: nn.Module, directory: Path, *, allow_other_base: bool = False) -> WarmStart:
    """Load what a PEFT directory holds into the adapter that `model` has already.

    Raises:
        AdapterError: as `load_adapter` does; or a scale, part or token row that is another here. Nothing is loaded
            then.
    """
    peft, tensors, record = read_directory(directory)
    if (start := start_in_file(peft)) != "gaussian":
        raise AdapterError(f"the adapter in {directory} counts on the start '{start}': start from its run's checkpoint")
    if started := [name for name, layer in adapted_layers(model) if layer.lora_A0 is not None]:
        raise AdapterError(
            f"lora.init subtracts a start, in '{started[0]}', that an adapter in PEFT's format does not have: leave"
            " lora.init out, or start from a checkpoint of a run with the same"
        )
    if record is None:
        warn_of_no_fingerprint(4)
    else:
        _check_base(record.base, model, allow_other_base=allow_other_base)
    peft, tensors = of_model(peft, tensors, model)
    tensors = without_base_copies(tensors, peft, model, allow_other_base=allow_other_base)
    keys = {key: PREFIX + copy_key(key) for key in adapter_tensors(model)}
    tensors, left = _with_own_heads(model, tensors, keys)
    ours = our_tensors(model, tensors, lambda name: token_ids(peft, name))
    _check_file(model, packed_layers(model, starts=False), peft, record)
    load_tensors(model, ours)
    return WarmStart(tensors=len(ours) - _in_heads(model, left), own_start=left)


def start_from_state(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    trained: LoRAConfig,
    config: LoRAConfig,
    base: Fingerprint,
    *,
    allow_other_base: bool = False,
) -> WarmStart:
    """Load a checkpoint's tensors, by their keys in the model's state dict, into the adapter that it has already.

    Args:
        trained: the settings that the checkpoint was trained with.
        config: those that `model` was injected with.
        base: the W0 that it was trained on.

    Raises:
        AdapterError: another base; tensors that are missing, left over or of other shapes; a scale, part or token row
            that is another here. Nothing is loaded then.
    """
    _check_base(base, model, allow_other_base=allow_other_base)
    tensors, left = _with_own_heads(model, tensors, {key: key for key in adapter_tensors(model)})
    sliced = any(layer.lora_settings.slices for _, layer in adapted_layers(model))
    fields = ["trainable_token_indices", "slices", *(["target_modules"] if sliced or trained.slices else [])]
    for name in fields:
        there, here = getattr(trained, name), getattr(config, name)
        if there != here:
            raise AdapterError(f"the adapter was trained with lora.{name}={there!r}, this run says {here!r}")
    refuse_misfits(adapter_tensors(model), tensors)
    _check_scales(
        model, {path: _scale_by(trained, layer.lora_name(path), layer) for path, layer in adapted_layers(model)}
    )
    load_tensors(model, tensors)
    return WarmStart(tensors=len(tensors) - _in_heads(model, left), own_start=left)


def _check_base(made_on: Fingerprint, model: nn.Module, *, allow_other_base: bool) -> None:
    """Compare W0, less what this run trains in full: that may be more than the earlier one did."""
    heads = tuple(f"{name}." for name, _ in grafted_modules(model, SavedCopy))
    tensors = {name: digest for name, digest in made_on.tensors.items() if not (heads and name.startswith(heads))}
    made_on = dataclasses.replace(made_on, tensors=tensors)
    refuse_other_base(made_on, fingerprint(model), allow_other_base=allow_other_base)


def _with_own_heads(
    model: nn.Module, tensors: Mapping[str, Tensor], keys: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors, with this model's own of each head that the file does not have, or has in another shape.

    Args:
        keys: the file's key of each of our keys.

    Returns:
        The tensors, and why each such head keeps its own start.
    """
    own, filled, left = adapter_tensors(model), dict(tensors), dict[str, str]()
    for name, _ in grafted_modules(model, SavedCopy):
        head = {keys[key]: tensor for key, tensor in own.items() if key.startswith(f"{joined(name, COPY)}.")}
        why = _why_new(head, tensors)
        if why:
            left[name] = why
            filled = {**{key: t for key, t in filled.items() if key not in head}, **head}
    return filled, left


def _why_new(head: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str | None:
    """Why a head keeps its own start, None where it is taken over; one of which a part is missing is a misfit."""
    if not head.keys() & tensors.keys():
        return "the adapter brings none"
    for key, tensor in head.items():
        if key in tensors and tensors[key].shape != tensor.shape:
            return f"{tuple(tensors[key].shape)} in the adapter, {tuple(tensor.shape)} here"
    return None


def _in_heads(model: nn.Module, heads: Mapping[str, str]) -> int:
    """How many tensors these modules train in full."""
    prefixes = tuple(f"{joined(name, COPY)}." for name in heads)
    return sum(bool(prefixes) and key.startswith(prefixes) for key in adapter_tensors(model))


def _scale_by(config: LoRAConfig, name: str, layer: AdaptedLayer) -> float:
    """s of a layer under another config, its rank as it is here."""
    alpha = by_pattern("alpha_pattern", config.alpha_pattern, [name], config.scaling_alpha)
    return config.scale(layer.lora_settings.r, alpha)


def _check_scales(model: nn.Module, trained: Mapping[str, float]) -> None:
    """Raise where a layer's s is another than in training: the update would be another."""
    for path, layer in adapted_layers(model):
        here = layer.lora_settings.scale
        if not math.isclose(trained[path], here, rel_tol=1e-9):
            raise AdapterError(
                f"the adapter was trained with a scale of {trained[path]:g} in '{layer.lora_name(path)}', this run's is"
                f" {here:g}: set lora.alpha (and use_rslora) as it was there"
            )


def _check_file(model: nn.Module, packed: list[Packed], peft: dict[str, Any], record: Record | None) -> None:
    """Raise where PEFT's config says what the tensors' shapes do not, and this run another thing."""
    alphas = trained_alphas(peft, {p.name: p.peft_name for p in packed}, {p.name: p.rank for p in packed}, {})
    roots = {p.name: math.sqrt(p.rank) if peft.get("use_rslora") else p.rank for p in packed}
    # PEFT's scale of two projections that share one may be another than ours, which B then makes up for.
    own = {p.path: p.layer.lora_settings.scale / p.scale for p in packed}
    _check_scales(model, {p.path: alphas[p.name] / roots[p.name] * own[p.path] for p in packed})
    for p in packed:
        parts = p.layer.lora_settings.slices
        there, here = record.slices.get(p.name) if record else None, parts.to_spec() if parts else None
        if there != here:
            raise AdapterError(f"the adapter was trained on the parts {there} of '{p.name}', this run says {here}")
    for name, embedding in grafted_modules(model, TokenRows):
        if sorted(token_ids(peft, name)) != embedding.__dict__["lora_token_numbers"]:
            raise AdapterError(f"the adapter trains other tokens of '{name}' than lora.trainable_token_indices names")
