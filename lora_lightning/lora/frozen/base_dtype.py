"""W0 in another dtype under adapters that keep theirs: bfloat16 weights, float32 A and B."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_lightning.lora.frozen.dtype import short
from lora_lightning.lora.frozen.quantization import scheme
from lora_lightning.lora.frozen.tensors import adapter_tensors, joined, named_modules
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.lora.layers import AdaptedLayer


@torch.no_grad()
def cast_base(model: nn.Module, dtype: torch.dtype, other: Mapping[str, torch.dtype] | None = None) -> None:
    """Round what is frozen to `dtype`, in place, one tensor at a time; done again it changes nothing.

    Left as they are: the adapter, what trains, quantised weights, whole numbers, and buffers that no file holds, such
    as the frequencies of rotary embeddings. Ties stay. Where DoRA's magnitudes still are W0's norms, they become those
    of the rounded W0, so that a fresh adapter changes nothing (law 1).

    Args:
        model: adapted, or with what is to be cast frozen.
        other: keys of the state dict that get a dtype of their own.
    """
    fresh = [layer for _, layer in adapted_layers(model) if _follows_its_base(layer)]
    for key, module, name, tensor in base_floats(model):
        wanted = (other or {}).get(key, dtype)
        if tensor.dtype == wanted:
            continue
        if name in module._parameters:
            tensor.data = tensor.to(wanted)  # the parameter stays the one that other modules share
        else:
            module._buffers[name] = tensor.to(wanted)
    for layer in fresh:
        assert layer.lora_magnitude_vector is not None
        layer.lora_magnitude_vector.copy_(layer.updated_norms())


def _follows_its_base(layer: AdaptedLayer) -> bool:
    magnitude = layer.lora_magnitude_vector
    return magnitude is not None and not magnitude.is_meta and torch.equal(magnitude, layer.updated_norms())


def base_floats(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """The frozen floating-point tensors that a file holds and that are plain: key, module, name there, tensor.

    A tensor in two places comes once. float8 and whatever else is narrower than 16 bits is storage, not arithmetic.
    """
    seen = {id(tensor) for tensor in adapter_tensors(model).values()}
    for path, module in named_modules(model):
        trains = any(p is not None and p.requires_grad and id(p) not in seen for p in module._parameters.values())
        kept = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in (*module._parameters.items(), *({} if trains else kept).items()):
            if tensor is None or id(tensor) in seen or tensor.requires_grad or (name == "weight" and scheme(module)):
                continue
            seen.add(id(tensor))
            if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
                yield joined(path, name), module, name, tensor


def base_dtypes(model: nn.Module) -> dict[str, int]:
    """How many of W0's numbers are held as what: by dtype, or by the name of their quantisation; the most first."""
    seen, counts = {id(tensor) for tensor in adapter_tensors(model).values()}, Counter[str]()
    for module in model.modules():
        own = scheme(module)
        for name, tensor in module._parameters.items():
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if name == "weight" and own is not None and isinstance(module, nn.Linear):
                counts[own] += module.in_features * module.out_features
            else:
                counts[short(tensor.dtype)] += tensor.numel()
    return dict(counts.most_common())
