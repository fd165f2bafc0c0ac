"""Fold the update into W0: once, from pristine W0, in float32 or wider."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.bank.strength import scaled
from lora_lightning.lora.errors import MergeError, warn
from lora_lightning.lora.frozen.dtype import cast, float_dtype, refuse_overflow
from lora_lightning.lora.frozen.quantization import make_plain, plain_weight, scheme
from lora_lightning.lora.frozen.tensors import full_name
from lora_lightning.lora.frozen.tied_weights import shared_parameters, untie_config, untied_since
from lora_lightning.lora.inject import grafted_modules, remove
from lora_lightning.lora.layers import AdaptedLayer, Grafted, take_out
from lora_lightning.lora.merge_refusals import refuse_codes, refuse_merge
from lora_lightning.lora.report import MergeReport, rounding_warning

LARGE = 1e9
"""While A, B and DoRA's magnitudes are smaller, no update comes near 3e38, the largest bfloat16 or float32."""


@torch.no_grad()
def merge(
    model: nn.Module, *, dequantize: bool = False, dtype: torch.dtype | None = None, scale: float = 1.0
) -> MergeReport:
    """Make the model plain again, in place, with `W0 + s B A` in its weights.

    Classes and keys are the original ones. Where an adapted module shares its weight with one that is not adapted, the
    adapted one gets a weight of its own, and a transformers config no longer says that they are tied. A merge cannot
    be undone: keep the adapter. An AdapterWarning names the layers where rounding erased more than a tenth of the
    update.

    Args:
        dequantize: turn quantized layers into plain ones, adapted or not, in the dtype of the model's floating-point
            tensors. A quantized weight is never written into: it would round most of the update away.
        dtype: of the merged model; W0's dtype by default. The sum is rounded to it once.
        scale: the strength of the update, as in `scaled`: 1 merges what was trained, 0.5 half of it, 0 nothing.

    Raises:
        LoRAError: a scale that is no finite number of at least 0, or that a layer cannot have.
        MergeError: nothing is adapted; a tensor of the adapter is not finite; a quantized layer and `dequantize`
            is False; a dtype that cannot hold the sum; a bias to add where the layer has none; a model on the meta
            device. The model is then unchanged.
    """
    with scaled(model, scale):
        refuse_merge(model, dequantize=dequantize, dtype=dtype)
        plain_dtype, modules = float_dtype(model), grafted_modules(model)
        for path, module in modules:
            _refuse_infinite(path, module, plain_dtype, dtype)
        if dtype is not None:
            cast(model, dtype, widen=True)
        report, ties, folded = MergeReport(), shared_parameters(model), dict[int, Any]()
        for path, module in modules:
            name = module.lora_name(path) if isinstance(module, AdaptedLayer) else path
            is_quantized = isinstance(module, AdaptedLayer) and scheme(module) is not None
            share = fold(path, module, folded, plain_dtype if is_quantized else None, dtype)
            report.kept.update({} if share is None else {name: share})
            report.dequantized.extend([name] if is_quantized else [])
        for name, plain in model.named_modules() if dequantize else ():
            if scheme(plain) is not None:
                report.dequantized.append(name)
                make_plain(plain, plain_weight(plain).to(plain_dtype))
        remove(model)
    report.untied.extend(untied_since(model, ties))
    if report.untied:
        untie_config(model)
    if dtype:
        cast(model, dtype)
    if lost := rounding_warning(report.kept, dtype or plain_dtype):
        warn(lost)
    return report


def fold(
    path: str,
    module: Grafted,
    folded: dict[int, Any],
    dtype: torch.dtype | None = None,
    rounded_to: torch.dtype | None = None,
) -> float | None:
    """Fold the update of one module, and what it trained in full, into its weights, in place.

    `folded` has new parameters by the id of the trained tensor: one mapping for a whole model keeps its ties. Returns
    the share of the update that rounding kept; None where nothing is added to W0's weights.

    Raises:
        MergeError: W0 is no weight to add to, the update is not finite, or rounding would make a number infinite.
    """
    for name, trained, original in module.trained_tensors():
        refuse_overflow(f"'{full_name(path, name)}'", trained, original.dtype)
    module.fold(folded)
    if not isinstance(module, AdaptedLayer):
        return None
    label, owner = module.lora_name(path), module.lora_owner
    refuse_codes(label, module)
    merged, share = merged_weights(module, dtype, rounded_to, label=label)
    if (total := _merged_bias(module, label)) is not None and (bias := module._parameters["bias"]) is not None:
        # A new parameter: the old one may be tied.
        module._parameters["bias"] = nn.Parameter(total.to(bias.dtype), requires_grad=bias.requires_grad)
    if scheme(module) is not None:
        take_out(owner)
        make_plain(owner, merged["weight"])
    else:  # new parameters: another module or another model may share W0
        owner._parameters.update({n: nn.Parameter(w, requires_grad=False) for n, w in merged.items()})
    return share


def merged_weights(
    layer: AdaptedLayer,
    dtype: torch.dtype | None = None,
    rounded_to: torch.dtype | None = None,
    *,
    label: str = "a layer",
) -> tuple[dict[str, Tensor], float]:
    """`W0 + s B A` for each of the layer's weights, and the share of the update that rounding kept.

    Args:
        dtype: of the results; the weight's dtype by default.
        rounded_to: the dtype that the results will be rounded to later, for that share.
        label: the layer's name, for the error.

    Raises:
        MergeError: the update is not finite, or rounding would make a number infinite.
    """
    merged: dict[str, Tensor] = {}
    wanted = lost = 0.0
    whole = layer.adapted_parameters()
    for name, place, before, delta in layer.updates():
        after = before + delta
        if name not in merged:
            shape = whole[name].shape if place else after.shape
            merged[name] = after.new_empty(shape, dtype=dtype or whole[name].dtype)
        rounded = rounded_to or merged[name].dtype
        refuse_overflow(f"W0 + s B A of '{label}'", after, rounded)
        merged[name][place] = after.to(merged[name].dtype)
        error = after.copy_(merged[name][place].to(rounded)).sub_(before).sub_(delta)  # no more memory for it
        norm = float(torch.linalg.vector_norm(delta))
        if not math.isfinite(norm) and not torch.isfinite(delta).all():  # else only its square is beyond float32
            raise MergeError(f"s B A of '{label}' is not finite: training diverged; merge an earlier checkpoint")
        wanted += norm**2
        lost += float(torch.linalg.vector_norm(error)) ** 2
    return merged, max(0.0, 1.0 - math.sqrt(lost / wanted)) if wanted > 0 else 1.0


def _merged_bias(layer: AdaptedLayer, label: str, dtype: torch.dtype | None = None) -> Tensor | None:
    """The bias plus s times B's, in float32 or wider; None without `lora_bias`. A MergeError where it overflows."""
    if layer.lora_B_bias is None:
        return None
    bias: Tensor = layer.bias  # type: ignore[assignment]  # the trained copy where there is one
    total = bias + layer.lora_B_bias * layer.lora_settings.scale
    refuse_overflow(f"the bias of '{label}' with lora_bias", total, dtype or bias.dtype)
    return total


def _refuse_infinite(path: str, module: Grafted, plain_dtype: torch.dtype, dtype: torch.dtype | None) -> None:
    """Raise a MergeError where a tensor that `fold` makes would become infinite in `dtype`, or in W0's dtype.

    `W0 + s B A` is computed only where that can happen: in float16, which ends at 65504, or with a large A or B.
    """
    for name, trained, original in module.trained_tensors():
        refuse_overflow(f"'{full_name(path, name)}'", trained, dtype or original.dtype)
    if not isinstance(module, AdaptedLayer):
        return
    label, is_quantized = module.lora_name(path), scheme(module) is not None
    refuse_codes(label, module)
    _merged_bias(module, label, dtype)
    dtypes = {dtype or (plain_dtype if is_quantized else w.dtype) for w in module.adapted_parameters().values()}
    is_large = any(tensor.numel() and tensor.abs().max() > LARGE for tensor in module.lora_tensors().values())
    if is_large or torch.float16 in dtypes:
        merged_weights(module, plain_dtype if is_quantized else None, dtype, label=label)
