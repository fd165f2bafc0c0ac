"""An adapter in PEFT's layout: what each adapted layer is called there, with which rank, alpha and tensors.

Where PEFT has no form for ours, the same update is written in a form that it has, of a larger rank and with zeros:
chosen parts of a fused projection, an attention of which only one projection is adapted, grouped convolutions, and
starts, whose `s (B A - B0 A0)` is [A; A0] and [B, -B0] of twice the rank.

PEFT 0.21 counts the update of an attention's `out_proj` twice (its PR 3774), and refuses an attention with `kdim` or
`vdim`: the directory is right, and such a model is best opened here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.formats.misfits import refuse_misfits
from lora_lightning.lora.frozen.tensors import adapter_tensors, joined
from lora_lightning.lora.inject import adapted_layers, grafted_modules
from lora_lightning.lora.layers import AdaptedLayer, LoRAMultiheadAttention, LoRAParameter, TokenRows, TrainedBias
from lora_lightning.lora.layers.parameter import CHILD

PREFIX = "base_model.model."


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
    started: bool
    """Whether a start, (A0, B0), is written with it."""
    rank: int
    """PEFT's."""
    scale: float
    """PEFT's. Where it is not the layer's own, B is written larger by the ratio."""
    one_alpha: float | None = None
    """PEFT's alpha, where one rank and one scale are written for all layers: the file is then what is loaded."""

    @property
    def keys(self) -> dict[str, str]:
        """PEFT's keys by the names of our tensors."""
        own = self.layer.lora_tensors()
        return {name: key.removeprefix(".") for name, key in self.layer.peft_keys(self.prefix).items() if name in own}

    @property
    def loads_as(self) -> tuple[int, float]:
        """Rank and alpha of the layer that the file's tensors make: a start has become a part of A and B."""
        s = self.layer.lora_settings
        if self.one_alpha is not None:
            return self.rank, self.one_alpha
        return (self.rank, self.alpha(rslora=s.scale != s.alpha / s.r)) if self.started else (s.r, s.alpha)

    def alpha(self, *, rslora: bool) -> float:
        """alpha such that PEFT's scale is ours."""
        if self.one_alpha is not None:
            return self.one_alpha
        s = self.layer.lora_settings
        if self.scale != s.scale:
            return self.scale * (math.sqrt(self.rank) if rslora else self.rank)
        grown = self.rank / s.r
        return s.alpha * (math.sqrt(grown) if rslora else grown)

    def tensors(self) -> dict[str, Tensor]:
        """By PEFT's keys."""
        tensors = self.layer.to_peft()
        if self.started:
            own = self.layer.lora_tensors()
            tensors |= {"lora_A": torch.cat([own["lora_A"], own["lora_A0"]])}
            tensors |= {"lora_B": torch.cat([own["lora_B"], -own["lora_B0"]], dim=1)}
        more = self.rank - self.layer.peft_rank() * (1 + self.started)
        if more:
            tensors |= {"lora_A": F.pad(tensors["lora_A"], (0, 0, 0, more))}
            tensors |= {"lora_B": F.pad(tensors["lora_B"], (0, more))}
        if self.scale != self.layer.lora_settings.scale:
            tensors |= {"lora_B": _times(tensors["lora_B"], self.layer.lora_settings.scale / self.scale)}
        return {self.keys[name]: tensor for name, tensor in tensors.items()}

    def unpack(self, file: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `tensors`, by our keys, from a file whose keys and shapes were checked."""
        tensors = {name: file[key] for name, key in self.keys.items()}
        own = self.layer.peft_rank()
        if self.rank != own:
            tensors |= {"lora_A": tensors["lora_A"][:own], "lora_B": tensors["lora_B"][:, :own]}
        if self.scale != self.layer.lora_settings.scale:
            tensors |= {"lora_B": _times(tensors["lora_B"], self.scale / self.layer.lora_settings.scale)}
        ours = self.layer.from_peft(tensors)
        return {f"{self.path}.{name}" if self.path else name: tensor for name, tensor in ours.items()}


def _times(tensor: Tensor, factor: float) -> Tensor:
    """Rounded once: torch would round the factor to the tensor's dtype first."""
    return (tensor.double() * factor).to(tensor.dtype)


def packed_layers(model: nn.Module, *, starts: bool = True) -> list[Packed]:
    """Every adapted layer of `model`, in its order; without their starts for a file that has none."""
    layers = dict(adapted_layers(model))
    modules = dict(model.named_modules(remove_duplicate=False))
    packed = []
    for path, layer in layers.items():
        parent, _, last = path.rpartition(".")
        started = starts and layer.lora_A0 is not None
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
            packed.append(_packed(layer, path, path=path, peft_name=path, prefix=path, started=started))
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
    started: bool = False,
) -> Packed:
    """`partner` is the attention's other projection: PEFT has one rank and one scale for both, in_proj's here."""
    rank, scale = layer.peft_rank() * (1 + started), layer.lora_settings.scale
    if partner is not None:
        rank = max(rank, partner.peft_rank())
        scale = scale if first else partner.lora_settings.scale
    return Packed(
        name=name, path=path, peft_name=peft_name, prefix=prefix, layer=layer, started=started, rank=rank, scale=scale
    )


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


def bias_keys(model: nn.Module, packed: list[Packed]) -> dict[str, str]:
    """PEFT's key of each trained bias, by ours: inside the wrapper where PEFT wraps the module."""
    inside = {p.path: f"{p.prefix}.base_layer" for p in packed}
    for p in packed:
        if isinstance(p.layer, LoRAParameter):
            owner = p.path.rpartition(".")[0]
            inside[owner] = inside.get(owner, owner) + ".base_layer"
        elif isinstance(p.layer, LoRAMultiheadAttention):
            inside.setdefault(joined(p.path, "out_proj"), joined(p.path, "base_layer.out_proj.base_layer"))
    return {
        joined(name, "lora_trained_bias"): joined(inside.get(name, name).removeprefix("."), "bias")
        for name, _ in grafted_modules(model, TrainedBias)
    }


def peft_tensors(model: nn.Module, packed: list[Packed]) -> dict[str, Tensor]:
    """Everything that a file of this adapter holds, by PEFT's keys."""
    own = adapter_tensors(model)
    tensors = fillers(packed)
    for p in packed:
        tensors |= p.tensors()
    tensors |= {token_key(name): embedding.lora_tokens for name, embedding in grafted_modules(model, TokenRows)}
    tensors |= {theirs: own[ours] for ours, theirs in bias_keys(model, packed).items()}
    tensors |= {copy_key(key): tensor for key, tensor in own.items() if copy_key(key) != key}
    return {PREFIX + key: tensor for key, tensor in tensors.items()}


def our_tensors(
    model: nn.Module, file: Mapping[str, Tensor], token_ids: Callable[[str], list[int]]
) -> dict[str, Tensor]:
    """The file's tensors by our keys; `token_ids` gives the order of an embedding's rows in the file.

    Raises:
        AdapterError: with the list of all keys that are missing, left over or wrongly shaped.
    """
    packed = packed_layers(model, starts=False)
    expected = peft_tensors(model, packed)
    optional = {PREFIX + key for key in fillers(packed)} - set(file)
    refuse_misfits({key: tensor for key, tensor in expected.items() if key not in optional}, file)
    file = {key.removeprefix(PREFIX): tensor for key, tensor in file.items()}
    ours: dict[str, Tensor] = {}
    for p in packed:
        ours |= p.unpack(file)
    for name, _ in grafted_modules(model, TokenRows):
        ours[joined(name, "lora_tokens")] = in_order(file[token_key(name)], token_ids(name))
    ours |= {key: file[theirs] for key, theirs in bias_keys(model, packed).items()}
    ours |= {key: file[copy_key(key)] for key in adapter_tensors(model) if copy_key(key) != key}
    return ours


def copy_key(key: str) -> str:
    """PEFT's key of a tensor of `modules_to_save`; any other key stays."""
    return f".{key}".replace(".lora_copy.", ".", 1)[1:]


def token_key(name: str) -> str:
    """PEFT's key of the trained rows of the embedding `name`."""
    return f"{name}.token_adapter.trainable_tokens_delta".removeprefix(".")


def in_order(rows: Tensor, token_ids: list[int]) -> Tensor:
    """Rows in the order of rising token numbers, as ours lie."""
    return rows[torch.tensor(sorted(range(len(token_ids)), key=token_ids.__getitem__))]
