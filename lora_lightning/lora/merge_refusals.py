"""What a merge refuses before its first write, so that a refused model does not change."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import MergeError
from lora_lightning.lora.frozen.dtype import float_dtype, refuse_dtype, refuse_overflow, refuse_wide
from lora_lightning.lora.frozen.quantization import plain_weight, scheme
from lora_lightning.lora.frozen.tensors import full_name
from lora_lightning.lora.inject import adapted_layers, grafted_modules
from lora_lightning.lora.layers import AdaptedLayer, SavedCopy, TokenRows, TrainedBias


def refuse_merge(model: nn.Module, *, dequantize: bool, dtype: torch.dtype | None) -> None:
    """Raise a MergeError for everything that can be refused before the first write."""
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
    _refuse_narrow(model, dtype)


def refuse(model: nn.Module, *, dequantize: bool = False) -> None:
    """Raise a MergeError for an adapter that is not finite, or that W0 has no place for, without reading W0."""
    for name, module in grafted_modules(model):
        for key, tensor in module.lora_tensors().items():
            if not torch.isfinite(tensor).all():
                what = "A or B" if key in ("lora_A", "lora_B") else key
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
                f"'{name}' is quantized ({scheme(layer)}), and rounding to its grid would lose most of the update:"
                f" merge(model, dequantize=True) makes plain layers, or merge into the base loaded unquantized"
            )


def refuse_codes(name: str, layer: AdaptedLayer) -> None:
    """Raise a MergeError for integer codes and 8-bit floats, which cannot hold an update."""
    for weight in layer.adapted_parameters(layer.lora_owner, layer.lora_settings).values():
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise MergeError(
                f"'{name}' holds its weight as {weight.dtype}: load the backbone unquantized and merge there"
            )


def _refuse_narrow(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Raise a MergeError where a copied tensor or a bias would become infinite, or a weight is integer codes."""
    plain_dtype = float_dtype(model)
    for name, module in model.named_modules():
        for key, trained, place in trained_tensors(module):
            refuse_overflow(f"'{full_name(name, key)}'", trained, dtype or place.dtype)
        if scheme(module) is not None and (dtype or plain_dtype) == torch.float16:
            refuse_overflow(f"'{name}', dequantized,", plain_weight(module), torch.float16)
    for path, layer in adapted_layers(model):
        name = layer.lora_name(path)
        if scheme(layer) is None:
            refuse_codes(name, layer)
        update, bias = layer.update_bias(), layer._parameters.get("bias")
        if update is not None and bias is not None:
            base = layer.lora_trained_bias if isinstance(layer, TrainedBias) else bias
            refuse_overflow(f"the bias of '{name}' with lora_bias", base + update, dtype or bias.dtype)
    if dtype is not None:
        refuse_wide(model, dtype)


def trained_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The tensors that a module trained in full: each as (the original's name, the trained values, the original)."""
    if isinstance(module, TrainedBias):
        yield "bias", module.lora_trained_bias, module._parameters["bias"]  # type: ignore[misc]
    if isinstance(module, TokenRows):
        yield "weight", module.lora_tokens, module.weight
    if isinstance(module, SavedCopy):
        yield from module.trained_tensors()
