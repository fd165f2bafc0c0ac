"""What a merge refuses before it writes anything, so that the model stays as it was; and what it says of rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import MergeError
from lora_lightning.lora.frozen.dtype import float_dtype, refuse_dtype, refuse_overflow, refuse_wide
from lora_lightning.lora.frozen.quantization import plain_weight, scheme
from lora_lightning.lora.frozen.tensors import joined
from lora_lightning.lora.inject import adapted_layers, grafted_modules
from lora_lightning.lora.layers import AdaptedLayer, SavedCopy, TokenRows, TrainedBias

LARGE = 1e9
"""Below it in A, B and DoRA's magnitudes, no update comes near the end of bfloat16 and float32, at 3e38."""
LEAST_KEPT = 0.9
"""A smaller share of an update kept by rounding is warned of."""


def refuse_before(model: nn.Module, *, dequantize: bool, dtype: torch.dtype | None) -> None:
    """All that can be refused before the first write, so that the model stays as it was."""
    if not adapted_layers(model) and not grafted_modules(model, SavedCopy) and not grafted_modules(model, TokenRows):
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
    for name, saved in grafted_modules(model, SavedCopy):
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
        for own, trained, place in _trained_tensors(module):
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
    for own, _, before, delta in layer.updates() if large or torch.float16 in target.values() else ():
        refuse_infinite(name, delta)
        refuse_overflow(f"W0 + s B A of '{name}'", before + delta, target[own])
    update, bias = layer.update_bias(), layer._parameters.get("bias")
    if update is not None and bias is not None:
        base = layer.lora_trained_bias if isinstance(layer, TrainedBias) else bias
        refuse_overflow(f"the bias of '{name}' with lora_bias", base + update, dtype or bias.dtype)


def refuse_infinite(name: str, delta: Tensor) -> None:
    """Raise a MergeError where finite A and B make an update that is not."""
    if not torch.isfinite(delta).all():
        raise MergeError(f"s B A of '{name}' is not finite: training diverged; merge an earlier checkpoint")


def _trained_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What a module was trained to hold: the name of the tensor that it takes the place of, its values, that tensor."""
    if isinstance(module, TrainedBias):
        yield "bias", module.lora_trained_bias, module._parameters["bias"]  # type: ignore[misc]
    if isinstance(module, TokenRows):
        yield "weight", module.lora_tokens, module.weight
    if isinstance(module, SavedCopy):
        own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
        for name, trained in (*module.lora_copy.named_parameters(), *module.lora_copy.named_buffers()):
            yield name, trained, own[name]


def count_low(kept: Mapping[str, float]) -> int:
    """In how many layers rounding erased more than a tenth of the update."""
    return sum(share < LEAST_KEPT for share in kept.values())


def rounding_warning(kept: Mapping[str, float], dtype: str) -> str | None:
    """What to say where rounding erased more than a tenth of some layers' updates, the worst of them named.

    Args:
        kept: by module, the share that was left.
        dtype: that was rounded to.
    """
    low = count_low(kept)
    if not low:
        return None
    worst = sorted((share, name) for name, share in kept.items())[: min(3, low)]
    return (
        f"rounding to {dtype} kept less than {LEAST_KEPT:.0%} of the update in {low} of {len(kept)} layers, least in"
        f" {', '.join(f'{name} ({share:.0%})' for share, name in worst)}: merge into float32 (dtype=torch.float32,"
        f" --dtype float32), or use the adapter, which lost nothing"
    )
