"""Fold the update into W0: made once, from pristine W0, in float32 or wider."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from lora_lightning.lora.errors import MergeError
from lora_lightning.lora.inject import adapted_layers, close, saved_copies, token_rows
from lora_lightning.lora.layers import AdaptedLayer, SavedCopy, TokenRows, ungraft


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
        MergeError: nothing is adapted, or A or B is not finite; the model is then as it was.
    """
    layers, saved, tokens = adapted_layers(model), saved_copies(model), token_rows(model)
    if not layers and not saved and not tokens:
        raise MergeError("nothing to merge: this model has no adapters")
    _refuse_infinite(layers, tokens)
    report = MergeReport()
    shared = _shared_weights(model)
    for path, layer in layers:
        name = layer.lora_name(path)
        report.kept[name], untied = _fold(layer, shared)
        if untied:
            report.untied.append(name)
        layer.detach()
    for _, embedding in tokens:
        embedding.keep_rows()
    for name, module in saved:
        if any(id(p) in shared for p in module.parameters()):
            report.untied.append(name)
        module.keep_copy()
        ungraft(module, SavedCopy)
    close(model)
    return report


def _refuse_infinite(layers: list[tuple[str, AdaptedLayer]], tokens: list[tuple[str, TokenRows]]) -> None:
    for name, layer in layers:
        if not (torch.isfinite(layer.lora_A).all() and torch.isfinite(layer.lora_B).all()):
            raise MergeError(f"A or B of '{name}' is not finite: training diverged; merge an earlier checkpoint")
    for name, embedding in tokens:
        if not torch.isfinite(embedding.lora_tokens).all():
            raise MergeError(f"a token row of '{name}' is not finite: training diverged; merge an earlier checkpoint")


def _shared_weights(model: nn.Module) -> set[int]:
    """Ids of the parameters that two different modules hold."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _fold(layer: AdaptedLayer, shared: set[int]) -> tuple[float, bool]:
    """Put `W0 + s B A` into the layer's weights.

    Returns the share of the update that rounding kept, and whether a weight had to be untied.
    """
    owner, parameters = layer.lora_owner, layer.adapted_parameters(layer.lora_owner, layer.lora_settings)
    wanted = lost = 0.0
    for name, delta in layer.weight_deltas().items():
        parameter = parameters[name]
        before = parameter.to(delta.dtype)
        merged = (before + delta).to(parameter.dtype)
        applied = merged.to(delta.dtype) - before
        wanted += float(torch.linalg.vector_norm(delta)) ** 2
        lost += float(torch.linalg.vector_norm(applied - delta)) ** 2
        if id(parameter) in shared:
            setattr(owner, name, nn.Parameter(merged, requires_grad=False))
        else:
            parameter.copy_(merged)
    kept = 1.0 - math.sqrt(lost / wanted) if wanted > 0 else 1.0
    return max(0.0, kept), any(id(p) in shared for p in parameters.values())
