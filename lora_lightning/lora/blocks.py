"""A large layer as layers over parts of its weight, so that a merge holds one part's update at a time.

Each part is a layer of the same kind over some of the weight's rows (columns where it lies transposed; entries of a
stack), with the factors that belong to them: what computes the whole layer's update computes the part's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_lightning.lora.frozen.quantization import scheme
from lora_lightning.lora.layers import AdaptedLayer, LoRAConv1D, LoRAEmbedding, LoRALinear, LoRAParameter

BLOCK = 2**20
"""Numbers of one part: 4 MB of float32, a handful of which a merge holds at a time."""

Place = tuple[slice, ...]


def blocks(layer: AdaptedLayer, elements: int = BLOCK) -> Iterator[tuple[AdaptedLayer, Place]]:
    """Parts of at most about `elements` numbers, each with its place in the weight; the layer itself where it is small.

    Convolutions, the fused projection of `nn.MultiheadAttention` and an embedding with DoRA, whose norms go over all
    rows, come whole.
    """
    owner, settings = layer.lora_owner, layer.lora_settings
    weights = layer.adapted_parameters(owner, settings)
    (name, weight), *more = weights.items()
    dim = 1 if isinstance(layer, LoRAConv1D) else 0
    has_parts = isinstance(layer, LoRALinear | LoRAConv1D | LoRAParameter) or (
        isinstance(layer, LoRAEmbedding) and not settings.use_dora
    )
    if more or not has_parts or weight.numel() <= elements or scheme(layer) is not None:
        yield layer, ()
        return
    count = weight.shape[dim]
    step = max(1, elements * count // weight.numel())
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        place = (slice(None),) * dim + (rows,)
        yield _part(layer, name, weight[place], rows), place


def sums(layer: AdaptedLayer) -> Iterator[tuple[str, Place, Tensor, Tensor]]:
    """By name and place in the weight, W0 and `s B A` in the wide dtype: a large layer comes part after part."""
    for part, place in blocks(layer):
        parameters = part.adapted_parameters(part.lora_owner, part.lora_settings)
        for name, delta in part.weight_deltas().items():
            yield name, place, (part.base_weight() if scheme(part) else parameters[name]).to(delta.dtype), delta


def _part(layer: AdaptedLayer, name: str, weight: Tensor, rows: slice) -> AdaptedLayer:
    """The layer over `weight`, which is its `rows`."""
    part = copy.copy(layer)
    tensors = dict(layer.lora_tensors())
    if isinstance(layer, LoRAEmbedding):
        tensors["lora_A"] = layer.lora_A[:, rows]
    elif isinstance(layer, LoRAParameter) and weight.dim() == 3:
        tensors["lora_A"], tensors["lora_B"] = _entries(layer, rows)
    else:
        tensors["lora_B"] = layer.to_peft()["lora_B"]  # of chosen parts, as of the whole
        for own in ("lora_B", "lora_B0", "lora_magnitude_vector"):
            tensors |= {own: tensors[own][rows]} if own in tensors else {}
        part.__dict__["lora_settings"] = replace(layer.lora_settings, slices=None)
    part.__dict__["_parameters"] = {**layer._parameters, **{n: t for n, t in tensors.items() if n in layer._parameters}}
    part.__dict__["_buffers"] = {**layer._buffers, **{n: t for n, t in tensors.items() if n in layer._buffers}}
    owner = part
    if isinstance(part, LoRAParameter):
        owner = copy.copy(part.lora_owner)  # type: ignore[assignment]
        owner.__dict__["_parameters"] = dict(owner._parameters)
        part._owner = (owner,)
    owner._parameters[name] = nn.Parameter(weight.detach(), requires_grad=False)  # a view
    return part


def _entries(layer: LoRAParameter, rows: slice) -> tuple[Tensor, Tensor]:
    """A and B of some of a stack's entries, see `LoRAParameter` for how they lie."""
    count = len(layer.adapted_parameters(layer.lora_owner, layer.lora_settings)[layer.lora_settings.parameter])
    A = torch.unflatten(layer.lora_A, 0, (count, -1))[rows].flatten(0, 1)
    B = torch.unflatten(layer.lora_B, 1, (-1, count))[..., rows].flatten(1)
    return A, B
