"""An adapter in PEFT's layout: what each adapted layer is called there, with which rank, alpha and tensors.

Where PEFT has no form for ours, the same update is written in a form that it has, of a larger rank and with zeros:
chosen parts of a fused projection, an attention of which only one projection is adapted, grouped convolutions.

PEFT 0.21 counts the update of an attention's `out_proj` twice (its PR 3774), and refuses an attention with `kdim` or
`vdim`: the directory is right, and such a model is best opened here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.inject import adapted_layers
from lora_lightning.lora.layers import AdaptedLayer, LoRAMultiheadAttention, LoRAParameter
from lora_lightning.lora.layers.parameter import CHILD


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One adapted layer as PEFT sees it."""

    name: str
    """What is adapted, by its name in the backbone: a module, or a bare parameter."""
    path: str
    """Where the layer's tensors are in our `state_dict`."""
    peft_name: str
    """What PEFT's config calls it: an attention's `out_proj` goes by the attention's name."""
    prefix: str
    """Where the layer's tensors are in PEFT's file."""
    layer: AdaptedLayer
    rank: int
    """PEFT's."""
    scale: float
    """PEFT's. Where it is not the layer's own, B is written larger by the ratio."""

    @property
    def keys(self) -> dict[str, str]:
        """PEFT's keys by the names of our tensors."""
        return {name: key.removeprefix(".") for name, key in self.layer.peft_keys(self.prefix).items()}

    def tensors(self) -> dict[str, Tensor]:
        """By PEFT's keys."""
        tensors = self.layer.to_peft()
        more = self.rank - self.layer.peft_rank()
        if more:
            tensors |= {"lora_A": F.pad(tensors["lora_A"], (0, 0, 0, more))}
            tensors |= {"lora_B": F.pad(tensors["lora_B"], (0, more))}
        if self.scale != self.layer.lora_settings.scale:
            tensors |= {"lora_B": tensors["lora_B"] * (self.layer.lora_settings.scale / self.scale)}
        return {self.keys[name]: tensor for name, tensor in tensors.items()}

    def unpack(self, file: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `tensors`, by our keys, from a file whose keys and shapes were checked."""
        tensors = {name: file[key] for name, key in self.keys.items()}
        own = self.layer.peft_rank()
        if self.rank != own:
            tensors |= {"lora_A": tensors["lora_A"][:own], "lora_B": tensors["lora_B"][:, :own]}
        if self.scale != self.layer.lora_settings.scale:
            tensors |= {"lora_B": tensors["lora_B"] * (self.scale / self.layer.lora_settings.scale)}
        ours = self.layer.from_peft(tensors)
        return {f"{self.path}.{name}" if self.path else name: tensor for name, tensor in ours.items()}


def packed_layers(model: nn.Module) -> list[Packed]:
    """Every adapted layer of `model`, in its order."""
    layers = dict(adapted_layers(model))
    modules = dict(model.named_modules(remove_duplicate=False))
    packed = []
    for path, layer in layers.items():
        parent, _, last = path.rpartition(".")
        holder = modules[parent]
        if isinstance(layer, LoRAParameter):
            prefix = parent + ".base_layer" * _later(layer, holder)
            name = layer.lora_name(path)
            packed.append(_packed(layer, name, path=path, peft_name=name, prefix=prefix))
        elif isinstance(holder, nn.MultiheadAttention) and last == "out_proj":
            prefix = ".".join(part for part in (parent, "base_layer.out_proj") if part)
            partner = layers.get(parent)
            packed.append(_packed(layer, path, path=path, peft_name=parent, prefix=prefix, partner=partner))
        elif isinstance(layer, LoRAMultiheadAttention):
            partner = layers.get(".".join(part for part in (path, "out_proj") if part))
            packed.append(_packed(layer, path, path=path, peft_name=path, prefix=path, partner=partner, first=True))
        else:
            packed.append(_packed(layer, path, path=path, peft_name=path, prefix=path))
    return packed


def _packed(
    layer: AdaptedLayer,
    name: str,
    *,
    path: str,
    peft_name: str,
    prefix: str,
    partner: AdaptedLayer | None = None,
    first: bool = False,
) -> Packed:
    """`partner` is the attention's other projection: PEFT has one rank and one scale for both, in_proj's here."""
    rank, scale = layer.peft_rank(), layer.lora_settings.scale
    if partner is not None:
        rank = max(rank, partner.peft_rank())
        scale = scale if first else partner.lora_settings.scale
    return Packed(name=name, path=path, peft_name=peft_name, prefix=prefix, layer=layer, rank=rank, scale=scale)


def _later(layer: LoRAParameter, holder: nn.Module) -> int:
    """Adapted parameters of the same module that were registered after this one: PEFT wraps it by each of them."""
    adapted = [name for name in holder._parameters if CHILD + name in holder._modules]
    return len(adapted) - 1 - adapted.index(layer.lora_settings.parameter)


def fillers(packed: list[Packed]) -> dict[str, Tensor]:
    """Zeros for the projection of an attention that is not adapted: PEFT adapts both or none."""
    there = {key for p in packed for key in p.keys.values()}
    made: dict[str, Tensor] = {}
    for p in packed:
        is_in = isinstance(p.layer, LoRAMultiheadAttention)
        if not is_in and p.name == p.peft_name:
            continue
        infix = "base_layer.out_proj" if is_in else ""
        prefix = ".".join(part for part in (p.peft_name, infix) if part)
        keys = AdaptedLayer.peft_keys(prefix)
        if keys["lora_A"] not in there and not isinstance(p.layer, LoRAParameter):
            width = p.layer.lora_B.shape[0] if not is_in else p.layer.get_parameter("out_proj.weight").shape[0]
            made[keys["lora_A"]] = p.layer.lora_A.new_zeros(p.rank, width)
            made[keys["lora_B"]] = p.layer.lora_A.new_zeros(width if is_in else 3 * width, p.rank)
    return made


def peft_alpha(packed: Packed, rslora: bool) -> float:
    """alpha such that PEFT's scale is ours."""
    s = packed.layer.lora_settings
    if packed.rank == s.r and packed.scale == s.scale:
        return s.alpha  # as the user wrote it
    return packed.scale * (math.sqrt(packed.rank) if rslora else packed.rank)


def token_key(name: str) -> str:
    """PEFT's key of the trained rows of the embedding `name`."""
    return f"{name}.token_adapter.trainable_tokens_delta".removeprefix(".")


def in_order(rows: Tensor, token_ids: list[int]) -> Tensor:
    """Rows in the order of rising token numbers, as ours lie."""
    return rows[torch.tensor(sorted(range(len(token_ids)), key=token_ids.__getitem__))]
