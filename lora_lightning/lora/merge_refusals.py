"""What a merge refuses before its first write, so that a refused model does not change."""

from __future__ import annotations

import torch
from torch import nn

from lora_lightning.lora.errors import MergeError
from lora_lightning.lora.frozen.dtype import float_dtype, refuse_dtype, refuse_overflow, refuse_wide
from lora_lightning.lora.frozen.quantization import plain_weight, scheme
from lora_lightning.lora.inject import grafted_modules
from lora_lightning.lora.layers import AdaptedLayer, SavedCopy, TokenRows


def refuse_merge(model: nn.Module, *, dequantize: bool, dtype: torch.dtype | None) -> None:
    """Raise a MergeError for everything that can be refused without computing an update."""
    if not any(isinstance(module, AdaptedLayer | SavedCopy | TokenRows) for _, module in grafted_modules(model)):
        raise MergeError("nothing to merge: this model has no adapters")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise MergeError(
            "the model is on the meta device, where W0 has no values: give it its weights first, or merge its files"
            " with `lora-lightning merge`"
        )
    if dtype is not None:
        refuse_dtype(dtype)
    refuse(model, dequantize=dequantize)
    if (dtype or float_dtype(model)) == torch.float16:
        for name, module in model.named_modules():
            if scheme(module) is not None:
                refuse_overflow(f"'{name}', dequantized,", plain_weight(module), torch.float16)
    if dtype is not None:
        refuse_wide(model, dtype)


def refuse(model: nn.Module, *, dequantize: bool = False) -> None:
    """Raise a MergeError for an adapter that is not finite, or that W0 has no place for, without reading W0."""
    for path, module in grafted_modules(model):
        named = [*module.lora_tensors().items()]
        if isinstance(module, SavedCopy):
            named += [("the copy", tensor) for tensor in module.lora_copy.state_dict().values()]
        for key, tensor in named:
            if not torch.isfinite(tensor).all():
                what = "A or B" if key in ("lora_A", "lora_B") else key
                raise MergeError(f"{what} of '{path}' is not finite: training diverged; merge an earlier checkpoint")
        if not isinstance(module, AdaptedLayer):
            continue
        name = module.lora_name(path)
        if module.lora_B_bias is not None and module._parameters.get("bias") is None:
            raise MergeError(
                f"lora_bias of '{name}' has no bias to be added to, and a new key would not load into the original"
                f" model: keep the adapter unmerged"
            )
        if scheme(module) is not None and not dequantize:
            raise MergeError(
                f"'{name}' is quantized ({scheme(module)}), and rounding to its grid would lose most of the update:"
                f" merge(model, dequantize=True) makes plain layers, or merge into the base loaded unquantized"
            )


def refuse_codes(name: str, layer: AdaptedLayer) -> None:
    """Raise a MergeError for codes and 8-bit floats, which cannot hold an update, unless a merge dequantizes them."""
    for weight in layer.adapted_parameters().values() if scheme(layer) is None else ():
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise MergeError(
                f"'{name}' holds its weight as {weight.dtype}: load the backbone unquantized and merge there"
            )
