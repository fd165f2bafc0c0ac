"""Fold the update into W0: made once, from pristine W0, in float32 or wider."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import warn
from lora_lightning.lora.frozen.dtype import cast, float_dtype, refuse_overflow, widen
from lora_lightning.lora.frozen.quantization import make_plain, plain_weight, scheme
from lora_lightning.lora.frozen.tied_weights import shared_parameters, untie_config, untied_since
from lora_lightning.lora.inject import adapted_layers, grafted_modules, remove
from lora_lightning.lora.layers import AdaptedLayer, SavedCopy, TokenRows, TrainedBias, take_out
from lora_lightning.lora.merge_checks import refuse_before, refuse_infinite, rounding_warning


@dataclass(frozen=True)
class MergeReport:
    """What rounding to W0's dtype did to each layer's update."""

    kept: dict[str, float] = field(default_factory=dict)
    """By module, 1 - ||W - W0 - s B A||_F / ||s B A||_F for the merged weight W: the share of the update that rounding
    left. 1 is all of it, 0 where the error is as large as the update."""
    untied: list[str] = field(default_factory=list)
    """Modules whose weight was shared with another module and is now their own."""
    dequantised: list[str] = field(default_factory=list)
    """Modules that were quantised and are plain `nn.Linear` now."""


@torch.no_grad()
def merge(model: nn.Module, *, dequantize: bool = False, dtype: torch.dtype | None = None) -> MergeReport:
    """Make the model plain again, in place, with `W0 + s B A` in its weights.

    Classes and keys are the original ones. A weight that is shared with a module which is not adapted is
    given to the adapted one as its own, for only that one was trained, and a transformers config no longer says
    that they are tied. Nothing can be unmerged: keep the adapter. An AdapterWarning names the layers of which rounding
    erased more than a tenth of the update.

    Args:
        dequantize: turn quantised layers into plain ones, adapted or not, in the dtype of the model's own
            floating-point tensors. A quantised weight is never written into: it would round most of the update away.
        dtype: of the merged model; W0's own by default. The sum is rounded to it once.

    Raises:
        MergeError: nothing is adapted; a tensor of the adapter is not finite; a quantised layer and `dequantize`
            is False; a dtype that cannot hold the sum; a bias to add where the layer has none; a model on the meta
            device. The model is then as it was.
    """
    refuse_before(model, dequantize=dequantize, dtype=dtype)
    layers, saved, tokens = adapted_layers(model), grafted_modules(model, SavedCopy), grafted_modules(model, TokenRows)
    if dtype is not None:
        widen(model, dtype)
    report = MergeReport()
    ties = shared_parameters(model)
    folded_biases: dict[int, nn.Parameter] = {}
    folded_copies: dict[int, Tensor] = {}
    for _, biased in grafted_modules(model, TrainedBias):
        biased.fold(folded_biases)
    plain_dtype = float_dtype(model)
    for path, layer in layers:
        name, owner, quantised = layer.lora_name(path), layer.lora_owner, scheme(layer) is not None
        merged, report.kept[name] = merged_weights(layer, plain_dtype if quantised else None, dtype, label=name)
        fold_bias(layer, name)
        if quantised:
            report.dequantised.append(name)
            take_out(owner)
            make_plain(owner, merged["weight"])
        else:
            _put(owner, merged)
    for _, embedding in tokens:
        embedding.fold()
    for _, module in saved:
        module.fold(folded_copies)
    for name, module in model.named_modules() if dequantize else ():
        if scheme(module) is not None:
            report.dequantised.append(name)
            make_plain(module, plain_weight(module).to(plain_dtype))
    remove(model)
    report.untied.extend(untied_since(model, ties))
    if report.untied:
        untie_config(model)
    if dtype:
        cast(model, dtype)
    if told := rounding_warning(report.kept, str(dtype or plain_dtype).removeprefix("torch.")):
        warn(told)
    return report


def merged_weights(
    layer: AdaptedLayer,
    dtype: torch.dtype | None = None,
    rounded_to: torch.dtype | None = None,
    *,
    label: str = "a layer",
) -> tuple[dict[str, Tensor], float]:
    """`W0 + s B A` for each of the layer's weights, in `dtype` or its own, and the share that rounding kept.

    A large layer is taken part after part, so that beside the results little is held in the wide dtype.

    Args:
        rounded_to: what the results will be rounded to later, for that share.
        label: the layer's name, for the error.

    Raises:
        MergeError: the update is not finite, or rounding would make a number infinite.
    """
    merged: dict[str, Tensor] = {}
    wanted = lost = 0.0
    whole = layer.adapted_parameters(layer.lora_owner, layer.lora_settings)
    for name, place, before, delta in layer.updates():
        after = before + delta
        if name not in merged:
            shape = whole[name].shape if place else after.shape
            merged[name] = after.new_empty(shape, dtype=dtype or whole[name].dtype)
        rounded = rounded_to or merged[name].dtype
        refuse_overflow(f"W0 + s B A of '{label}'", after, rounded)
        merged[name][place] = after.to(merged[name].dtype)
        stored = merged[name][place].to(rounded).to(delta.dtype)
        norm = float(torch.linalg.vector_norm(delta))
        if not math.isfinite(norm):  # or its square is beyond float32
            refuse_infinite(label, delta)
        wanted += norm**2
        lost += float(torch.linalg.vector_norm(stored - before - delta)) ** 2
    return merged, max(0.0, 1.0 - math.sqrt(lost / wanted)) if wanted > 0 else 1.0


def _put(module: nn.Module, merged: dict[str, Tensor]) -> None:
    """The weights as parameters in memory of their own: W0's may be another module's or another model's too."""
    for name, weight in merged.items():
        module._parameters[name] = nn.Parameter(weight, requires_grad=False)


def fold_bias(layer: AdaptedLayer, label: str = "a layer") -> None:
    """Add `lora_bias` to the layer's bias, in a new parameter: the old one may be tied.

    Raises:
        MergeError: rounding would make a number infinite.
    """
    update, own = layer.update_bias(), layer._parameters.get("bias")
    if update is not None and own is not None:
        merged = own.to(update.dtype) + update
        refuse_overflow(f"the bias of '{label}' with lora_bias", merged, own.dtype)
        layer._parameters["bias"] = nn.Parameter(merged.to(own.dtype), requires_grad=own.requires_grad)
