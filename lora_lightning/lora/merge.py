"""Fold the update into W0: made once, from pristine W0, in float32 or wider."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from lora_lightning.lora import fastpath
from lora_lightning.lora.errors import MergeError
from lora_lightning.lora.inject import adapted_layers, saved_copies
from lora_lightning.lora.layers import AdaptedLayer, ungraft


@dataclass(frozen=True)
class MergeReport:
    """What rounding to W0's dtype did to each layer's update."""

    kept: dict[str, float] = field(default_factory=dict)
    """By module, 1 - ||applied - s B A||_F / ||s B A||_F: the share of the update that the merged weight holds.
    1 is all of it."""
    untied: list[str] = field(default_factory=list)
    """Modules whose weight was shared with another module and is now their own."""


@torch.no_grad()
def merge(model: nn.Module) -> MergeReport:
    """Make the model plain again, in place, with `W0 + s B A` in its weights.

    Classes and keys are the original ones. A weight that is shared with a module which is not adapted is
    given to the adapted one as its own, for only that one was trained. Nothing can be unmerged: keep the adapter.

    Raises:
        MergeError: nothing is adapted; A, B or a trained copy is not finite; or W0's dtype cannot hold the sum.
            The model is then as it was.
    """
    layers = adapted_layers(model)
    saved = saved_copies(model)
    if not layers and not saved:
        raise MergeError("nothing to merge: this model has no adapters")
    for name, layer in layers:
        if not (torch.isfinite(layer.lora_A).all() and torch.isfinite(layer.lora_B).all()):
            raise MergeError(f"A or B of '{name}' is not finite: training diverged; merge an earlier checkpoint")
        _refuse_narrow(name, layer)
    for name, module in saved:
        if not all(torch.isfinite(tensor).all() for tensor in module.lora_copy.state_dict().values()):
            raise MergeError(f"the trained copy of '{name}' is not finite: merge an earlier checkpoint")
    report = MergeReport()
    shared = _shared_weights(model)
    for name, layer in layers:
        tied = id(layer.weight) in shared
        report.kept[name] = _fold(layer, in_place=not tied)
        if tied:
            report.untied.append(name)
        layer.drop_factors()
        ungraft(layer)
    for name, module in saved:
        if any(id(p) in shared for p in module.parameters()):
            report.untied.append(name)
        module.keep_copy()
        ungraft(module)
    fastpath.allow(model)
    return report


def _shared_weights(model: nn.Module) -> set[int]:
    """Ids of the parameters that two different modules hold."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _refuse_narrow(name: str, layer: AdaptedLayer) -> None:
    """Integer codes cannot take an update, and float16 ends at 65504."""
    dtype = layer.weight.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise MergeError(f"'{name}' holds its weight as {dtype}: load the backbone unquantised and merge there")
    if dtype == torch.float16 and not torch.isfinite((layer.weight + layer.delta_weight()).half()).all():
        raise MergeError(f"W0 + s B A of '{name}' is larger than float16 can hold: merge into float32 or bfloat16")


def _fold(layer: AdaptedLayer, *, in_place: bool) -> float:
    """Put `W0 + s B A` into the layer's weight; return the share of the update that rounding kept."""
    delta = layer.delta_weight()
    before = layer.weight.to(delta.dtype)
    merged = (before + delta).to(layer.weight.dtype)
    applied = merged.to(delta.dtype) - before
    size = torch.linalg.vector_norm(delta)
    kept = 1.0 - float(torch.linalg.vector_norm(applied - delta) / size) if size > 0 else 1.0
    if in_place:
        layer.weight.copy_(merged)
    else:
        layer.weight = nn.Parameter(merged, requires_grad=False)
    return max(0.0, kept)
