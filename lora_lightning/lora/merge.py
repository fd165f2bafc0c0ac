"""Fold the update into W0: made once, from pristine W0, in float32 or wider."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_lightning.lora.adapter import joined
from lora_lightning.lora.blocks import Place, blocks
from lora_lightning.lora.casting import cast, float_dtype, refuse_dtype, refuse_overflow, refuse_wide, widen
from lora_lightning.lora.errors import MergeError
from lora_lightning.lora.inject import (
    adapted_layers,
    close,
    grafted_modules,
    saved_copies,
    token_rows,
    trained_biases,
)
from lora_lightning.lora.layers import AdaptedLayer, SavedCopy, TokenRows, TrainedBias, ungraft
from lora_lightning.lora.quantised import make_plain, plain_weight, scheme
from lora_lightning.lora.ties import shared_parameters, untie_config, untied_since

LARGE = 1e9
"""Below it in A, B and DoRA's magnitudes, no update comes near the end of bfloat16 and float32, at 3e38."""


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
    that they are tied. Nothing can be unmerged: keep the adapter.

    Args:
        dequantize: turn quantised layers into plain ones, adapted or not, in the dtype of the model's own
            floating-point tensors. A quantised weight is never written into: it would round most of the update away.
        dtype: of the merged model; W0's own by default. The sum is rounded to it once.

    Raises:
        MergeError: nothing is adapted; a tensor of the adapter is not finite; a quantised layer and `dequantize`
            is False; a dtype that cannot hold the sum; a bias to add where the layer has none; a model on the meta
            device. The model is then as it was.
    """
    _refuse_before(model, dequantize=dequantize, dtype=dtype)
    layers, saved, tokens = adapted_layers(model), saved_copies(model), token_rows(model)
    if dtype is not None:
        widen(model, dtype)
    report = MergeReport()
    ties = shared_parameters(model)
    kept_biases: dict[int, nn.Parameter] = {}
    kept_copies: dict[int, Tensor] = {}
    for _, biased in trained_biases(model):
        biased.keep_bias(kept_biases)
        ungraft(biased, TrainedBias)
    plain_dtype = float_dtype(model)
    for path, layer in layers:
        name, owner, quantised = layer.lora_name(path), layer.lora_owner, scheme(layer) is not None
        merged, report.kept[name] = merged_weights(layer, plain_dtype if quantised else None, dtype, label=name)
        fold_bias(layer, name)
        layer.detach()
        if quantised:
            report.dequantised.append(name)
            make_plain(owner, merged["weight"])
        else:
            _put(owner, merged, ties)
    for _, embedding in tokens:
        embedding.keep_rows()
    for _, module in saved:
        module.keep_copy(kept_copies)
        ungraft(module, SavedCopy)
    for name, module in model.named_modules() if dequantize else ():
        if scheme(module) is not None:
            report.dequantised.append(name)
            make_plain(module, plain_weight(module).to(plain_dtype))
    if untied_since(model, ties):
        untie_config(model)
    report.untied.extend(untied_since(model, ties))
    close(model)
    if dtype:
        cast(model, dtype)
    return report


def _refuse_before(model: nn.Module, *, dequantize: bool, dtype: torch.dtype | None) -> None:
    """All that can be refused before the first write, so that the model stays as it was."""
    if not adapted_layers(model) and not saved_copies(model) and not token_rows(model):
        raise MergeError("nothing to merge: this model has no adapters")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise MergeError(
            "the model is on the meta device, where W0 has no values: give it its weights first, or merge its files"
            " with `lora-lightning merge`"
        )
    if dtype is not None:
        refuse_dtype(dtype)
    refuse(model, dequantize=dequantize)
    refuse_narrow(model, dtype)


def refuse(model: nn.Module, *, dequantize: bool = False) -> None:
    """Raise a MergeError for an adapter that is not finite, or that W0 has no place for; W0 itself is not read."""
    for name, module in grafted_modules(model):
        for own, tensor in module.lora_tensors().items():
            if not torch.isfinite(tensor).all():
                what = "A or B" if own in ("lora_A", "lora_B") else own
                raise MergeError(f"{what} of '{name}' is not finite: training diverged; merge an earlier checkpoint")
    for name, saved in saved_copies(model):
        if not all(torch.isfinite(tensor).all() for tensor in saved.lora_copy.state_dict().values()):
            raise MergeError(f"the copy of '{name}' is not finite: training diverged; merge an earlier checkpoint")
    for path, layer in adapted_layers(model):
        name = layer.lora_name(path)
        if layer.lora_B_bias is not None and layer._parameters.get("bias") is None:
            raise MergeError(
                f"lora_bias of '{name}' has no bias to be added to, and a new key would not load into the original"
                f" model: keep the adapter unmerged"
            )
        if scheme(layer) is not None and not dequantize:
            raise MergeError(
                f"'{name}' is quantised ({scheme(layer)}), and rounding to its grid would lose most of the update:"
                f" merge(model, dequantize=True) makes plain layers, or merge into the base loaded unquantised"
            )


def refuse_codes(name: str, layer: AdaptedLayer) -> None:
    """Integer codes, and floating-point numbers of a byte, cannot take an update."""
    for weight in layer.adapted_parameters(layer.lora_owner, layer.lora_settings).values():
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise MergeError(
                f"'{name}' holds its weight as {weight.dtype}: load the backbone unquantised and merge there"
            )


def refuse_narrow(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Raise where what a merge writes would become infinite in `dtype`, or in the dtype of what it takes the place of.

    Sums are computed for it where they may come near: for float16, which ends at 65504, or of a large A or B.

    Raises:
        MergeError: with the name of the first.
    """
    plain_dtype = float_dtype(model)
    for name, module in model.named_modules():
        for own, trained, place in _brought(module):
            refuse_overflow(f"'{joined(name, own)}'", trained, dtype or place.dtype)
        if scheme(module) is not None and (dtype or plain_dtype) == torch.float16:
            refuse_overflow(f"'{name}', dequantised,", plain_weight(module), torch.float16)
    for path, layer in adapted_layers(model):
        _refuse_narrow(layer.lora_name(path), layer, dtype, plain_dtype)
    if dtype is not None:
        refuse_wide(model, dtype)


def _refuse_narrow(name: str, layer: AdaptedLayer, dtype: torch.dtype | None, plain_dtype: torch.dtype) -> None:
    quantised = scheme(layer) is not None
    if not quantised:
        refuse_codes(name, layer)
    weights = layer.adapted_parameters(layer.lora_owner, layer.lora_settings)
    target = {own: dtype or (plain_dtype if quantised else weight.dtype) for own, weight in weights.items()}
    large = any(tensor.numel() and tensor.abs().max() > LARGE for tensor in layer.lora_tensors().values())
    for own, _, before, delta in _sums(layer) if large or torch.float16 in target.values() else ():
        _refuse_infinite(name, delta)
        refuse_overflow(f"W0 + s B A of '{name}'", before + delta, target[own])
    update, bias = layer.update_bias(), layer._parameters.get("bias")
    if update is not None and bias is not None:
        base = layer.lora_trained_bias if isinstance(layer, TrainedBias) else bias
        refuse_overflow(f"the bias of '{name}' with lora_bias", base + update, dtype or bias.dtype)


def _refuse_infinite(name: str, delta: Tensor) -> None:
    if not torch.isfinite(delta).all():
        raise MergeError(f"s B A of '{name}' is not finite: training diverged; merge an earlier checkpoint")


def _brought(module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What a module was trained to hold: the name of the tensor that it takes the place of, its values, that tensor."""
    if isinstance(module, TrainedBias):
        yield "bias", module.lora_trained_bias, module._parameters["bias"]  # type: ignore[misc]
    if isinstance(module, TokenRows):
        yield "weight", module.lora_tokens, module.weight
    if isinstance(module, SavedCopy):
        own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
        for name, trained in (*module.lora_copy.named_parameters(), *module.lora_copy.named_buffers()):
            yield name, trained, own[name]


def _sums(layer: AdaptedLayer) -> Iterator[tuple[str, Place, Tensor, Tensor]]:
    """By name and place in the weight, W0 and `s B A` in the wide dtype: a large layer comes part after part."""
    for part, place in blocks(layer):
        parameters = part.adapted_parameters(part.lora_owner, part.lora_settings)
        for name, delta in part.weight_deltas().items():
            yield name, place, (part.base_weight() if scheme(part) else parameters[name]).to(delta.dtype), delta


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
    for name, place, before, delta in _sums(layer):
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
            _refuse_infinite(label, delta)
        wanted += norm**2
        lost += float(torch.linalg.vector_norm(stored - before - delta)) ** 2
    return merged, max(0.0, 1.0 - math.sqrt(lost / wanted)) if wanted > 0 else 1.0


def _put(module: nn.Module, merged: dict[str, Tensor], ties: Container[int]) -> None:
    """Write the weights in place, or as parameters of their own where they are shared with another module."""
    for name, weight in merged.items():
        own = module._parameters[name]
        assert own is not None
        if id(own) in ties:
            module._parameters[name] = nn.Parameter(weight, requires_grad=False)
        else:
            own.copy_(weight)


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
