"""An adapter in PEFT's layout: the name, rank, alpha and tensors of each adapted layer there.

Where PEFT has no form for a layer, the same update is written as A and B of a larger rank, with zeros: chosen parts of
a fused projection, an attention with one adapted projection, grouped convolutions, and subtracted inits, whose
`s (B A - B0 A0)` is [A; A0] and [B, -B0] of twice the rank.

vLLM ignores `rank_pattern` and `alpha_pattern` (its `vllm/lora/peft_helper.py` and `lora_model.py`), and reads only A
and B of linear layers. For it all layers have one rank and one `lora_alpha / r`: A gets rows and B columns of zeros,
which changes nothing, and B takes the quotient of the two scales.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError, first_few, warn
from lora_lightning.lora.formats.peft.keys import PREFIX, copy_key, token_key
from lora_lightning.lora.frozen.spectrum import pad_pair, subtract_init
from lora_lightning.lora.frozen.tensors import adapter_tensors, full_name, named_modules, refuse_misfits
from lora_lightning.lora.inject import adapted_layers, modules_of_kind
from lora_lightning.lora.layers import (
    AdaptedLayer,
    LoRALinear,
    LoRAMultiheadAttention,
    LoRAParameter,
    SavedCopy,
    TokenRows,
    TrainedBias,
    kind_of,
)
from lora_lightning.lora.layers.parameter import CHILD


@dataclass(frozen=True)
class LayerLayout:
    """One adapted layer in PEFT's layout."""

    name: str
    """The name in the backbone of the adapted module or bare parameter."""
    path: str
    """Where the layer's tensors are in our `state_dict`."""
    peft_name: str
    """The name in PEFT's config, where an attention's `out_proj` has the attention's name."""
    prefix: str
    """Where the layer's tensors are in PEFT's file."""
    layer: AdaptedLayer
    has_init: bool
    """Whether a subtracted init, (A0, B0), is written with it."""
    rank: int
    """The rank of the file's tensors."""
    scale: float
    """The scale that PEFT applies. Where it is not the layer's, B is written larger by the ratio."""
    rslora: bool
    """Whether the file's scales are alpha / sqrt(rank), and not alpha / rank."""
    one_alpha: float | None = None
    """The alpha of all layers in vLLM's form, in which the layer is also loaded; None in PEFT's form."""

    @property
    def keys(self) -> dict[str, str]:
        """The layer's keys in PEFT's file, by our tensors' names."""
        present = self.layer.lora_tensors()
        keys = self.layer.peft_keys(self.prefix)
        return {name: key.removeprefix(".") for name, key in keys.items() if name in present}

    @property
    def alpha(self) -> float:
        """The alpha for PEFT's config."""
        s, root = self.layer.lora_settings, math.sqrt if self.rslora else float
        if self.one_alpha is not None:
            return self.one_alpha
        return s.alpha * root(self.rank / s.r) if self.scale == s.scale else self.scale * root(self.rank)

    @property
    def loaded_settings(self) -> tuple[int, float, float]:
        """Rank and alpha of the layer that is loaded from the file, and the scale that PEFT applies.

        A subtracted init is part of the loaded A and B. The scale is then computed as for the loaded layer, so that
        what is saved from that one has the same bytes.
        """
        s = self.layer.lora_settings
        if self.one_alpha is not None:
            return self.rank, self.one_alpha, self.scale
        if not self.has_init:
            return s.r, float(s.alpha), self.scale
        return self.rank, float(self.alpha), self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def tensors(self) -> dict[str, Tensor]:
        """The layer's tensors in the file, by PEFT's keys."""
        layer, tensors = self.layer, self.layer.to_peft()
        pair = tensors["lora_A"], tensors["lora_B"]
        pair = subtract_init(pair, layer.lora_A0, layer.lora_B0) if self.has_init else pair
        A, B = pad_pair(pair, self.rank - layer.peft_rank() * (1 + self.has_init))
        tensors |= {"lora_A": A, "lora_B": _rescale(B, layer.lora_settings.scale, self.scale)}
        return {self.keys[name]: tensor for name, tensor in tensors.items()}

    def to_ours(self, file: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `tensors`, by our keys, from a file whose keys and shapes were checked."""
        tensors = {name: file[key] for name, key in self.keys.items()}
        rank = self.layer.peft_rank()
        if self.rank != rank:
            tensors |= {"lora_A": tensors["lora_A"][:rank], "lora_B": tensors["lora_B"][:, :rank]}
        tensors["lora_B"] = _rescale(tensors["lora_B"], self.scale, self.layer.lora_settings.scale)
        return {full_name(self.path, name): tensor for name, tensor in self.layer.from_peft(tensors).items()}


def _rescale(B: Tensor, scale: float, other: float) -> Tensor:
    """B for another scale, rounded once: torch would round the factor to the tensor's dtype first."""
    return B if scale == other else (B.double() * (scale / other)).to(B.dtype)


def layer_layouts(model: nn.Module, *, inits: bool = True) -> list[LayerLayout]:
    """Every adapted layer in the model's order, for a file with subtracted inits or without (`inits`).

    PEFT has one rank and one scale for the two projections of an attention: the larger rank, and in_proj's scale.
    """
    layers = dict(adapted_layers(model))
    modules = dict(named_modules(model, remove_duplicate=False))
    # At r = 1 the two scales are one.
    rslora = any(s.scale != s.alpha / s.r for s in (layer.lora_settings for layer in layers.values()))
    layouts = []
    for path, layer in layers.items():
        parent, _, last = path.rpartition(".")
        name = peft_name = prefix = path
        scale, partner = layer.lora_settings.scale, None
        if isinstance(layer, LoRAParameter):
            name = peft_name = layer.lora_name(path)
            holder = modules[parent]  # each adapted parameter that was registered later adds a wrapper in PEFT
            adapted = [name for name in holder._parameters if CHILD + name in holder._modules]
            later = len(adapted) - 1 - adapted.index(layer.lora_settings.parameter)
            prefix = parent + ".base_layer" * later
        elif isinstance(modules[parent], nn.MultiheadAttention) and last == "out_proj":
            peft_name, prefix, partner = parent, full_name(parent, "base_layer.out_proj"), layers.get(parent)
            scale = partner.lora_settings.scale if partner else scale
        elif isinstance(layer, LoRAMultiheadAttention):
            partner = layers.get(full_name(path, "out_proj"))
        has_init = inits and layer.lora_A0 is not None
        rank = max(one.peft_rank() * (1 + (inits and one.lora_A0 is not None)) for one in (layer, partner or layer))
        layouts.append(LayerLayout(name, path, peft_name, prefix, layer, has_init, rank, scale, rslora))
    return layouts


def zero_factors(layouts: list[LayerLayout]) -> dict[str, Tensor]:
    """Zeros for an attention's projection that is not adapted: PEFT adapts both projections or none."""
    present = {key for layout in layouts for key in layout.keys.values()}
    zeros: dict[str, Tensor] = {}
    for layout in layouts:
        is_in = isinstance(layout.layer, LoRAMultiheadAttention)
        if isinstance(layout.layer, LoRAParameter) or (not is_in and layout.name == layout.peft_name):
            continue
        keys = AdaptedLayer.peft_keys(full_name(layout.peft_name, "base_layer.out_proj" if is_in else ""))
        if keys["lora_A"] not in present:
            width = layout.layer.get_parameter("out_proj.weight").shape[0] if is_in else layout.layer.lora_B.shape[0]
            zeros[keys["lora_A"]] = layout.layer.lora_A.new_zeros(layout.rank, width)
            zeros[keys["lora_B"]] = layout.layer.lora_A.new_zeros(width if is_in else 3 * width, layout.rank)
    return zeros


def other_keys(model: nn.Module, layouts: list[LayerLayout]) -> dict[str, str]:
    """PEFT's key of each tensor of `modules_to_save` and each trained bias, by our key.

    A bias is inside the wrapper where PEFT wraps its module.
    """
    inside = {one.path: f"{one.prefix}.base_layer" for one in layouts}
    for one in layouts:
        if isinstance(one.layer, LoRAParameter):
            owner = one.path.rpartition(".")[0]
            inside[owner] = inside.get(owner, owner) + ".base_layer"
        elif isinstance(one.layer, LoRAMultiheadAttention):
            inside.setdefault(full_name(one.path, "out_proj"), full_name(one.path, "base_layer.out_proj.base_layer"))
    keys = {key: copy_key(key) for key in adapter_tensors(model) if copy_key(key) != key}
    for name, _ in modules_of_kind(model, TrainedBias):
        keys[full_name(name, "lora_trained_bias")] = full_name(inside.get(name, name).removeprefix("."), "bias")
    return keys


def to_peft(model: nn.Module, layouts: list[LayerLayout]) -> dict[str, Tensor]:
    """All tensors for this adapter's file, by PEFT's keys."""
    trained = adapter_tensors(model)
    tensors = zero_factors(layouts)
    for layout in layouts:
        tensors |= layout.tensors()
    tensors |= {token_key(name): embedding.lora_tokens for name, embedding in modules_of_kind(model, TokenRows)}
    tensors |= {theirs: trained[ours] for ours, theirs in other_keys(model, layouts).items()}
    return {PREFIX + key: tensor for key, tensor in tensors.items()}


def from_peft(model: nn.Module, file: Mapping[str, Tensor], token_ids: Callable[[str], list[int]]) -> dict[str, Tensor]:
    """The file's tensors by our names, token rows in the order of `token_ids`; an AdapterError lists misfits."""
    layouts = layer_layouts(model, inits=False)
    optional = {PREFIX + key for key in zero_factors(layouts)} - set(file)
    refuse_misfits({k: t for k, t in to_peft(model, layouts).items() if k not in optional}, file)
    file = {key.removeprefix(PREFIX): tensor for key, tensor in file.items()}
    ours: dict[str, Tensor] = {}
    for layout in layouts:
        ours |= layout.to_ours(file)
    for name, _ in modules_of_kind(model, TokenRows):
        ids = token_ids(name)
        rising = torch.tensor(sorted(range(len(ids)), key=ids.__getitem__))
        ours[full_name(name, "lora_tokens")] = file[token_key(name)][rising]
    return ours | {key: file[theirs] for key, theirs in other_keys(model, layouts).items()}


MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's `--max-lora-rank`."""
DEFAULT_MAX_RANK = 16


def fold_for_vllm(model: nn.Module, layouts: list[LayerLayout]) -> list[LayerLayout]:
    """`layouts` with one rank R and one scale S for all: `S B' A' = s B A` with A' = [A; 0], B' = [s / S B, 0].

    S is the most common scale that is a whole number over R, else 1. B' equals B where s is S, is exact where s / S is
    a power of two, and is rounded once elsewhere.

    Raises:
        AdapterError: vLLM cannot serve the adapter; the error lists the reasons.
    """
    reasons: dict[str, list[str]] = {
        "DoRA": [one.name for one in layouts if one.layer.lora_settings.use_dora],
        "a bias on B (lora_bias)": [one.name for one in layouts if one.layer.lora_settings.lora_bias],
        "modules trained in full (modules_to_save)": [name for name, _ in modules_of_kind(model, SavedCopy)],
        "trained token rows": [name for name, _ in modules_of_kind(model, TokenRows)],
        "trained biases": [name for name, _ in modules_of_kind(model, TrainedBias)],
    }
    for one in sorted(layouts, key=lambda one: one.layer.kind):
        if not isinstance(one.layer, LoRALinear):
            reasons.setdefault(f"an adapter on {one.layer.kind}", []).append(one.name)
        elif one.name != one.peft_name:
            reasons.setdefault("an adapter in nn.MultiheadAttention", []).append(one.name)
    if without := [f"{what}: {first_few(names)}" for what, names in reasons.items() if names]:
        raise AdapterError(
            f"vLLM takes A and B of linear layers alone and has no form for {'; '.join(without)}: serve the merged"
            " model"
        )
    if not layouts:
        raise AdapterError("nothing to serve: this model has no adapted layer")
    rank = max(layout.rank for layout in layouts)
    allowed = next((limit for limit in MAX_RANKS if limit >= rank), None)
    if allowed is None:
        most = MAX_RANKS[-1]  # with the parts of fused layers and subtracted inits counted
        raise AdapterError(f"vLLM serves ranks up to {most} and this adapter's is {rank}: serve the merged model")
    if allowed > DEFAULT_MAX_RANK:
        warn(f"rank {rank}: start vLLM with --max-lora-rank {allowed} (its default is {DEFAULT_MAX_RANK})")
    counts = Counter(layout.scale for layout in layouts)
    whole = [s for s in counts if round(s * rank) and round(s * rank) / rank == s]  # lora_alpha is a whole number there
    scale = min(whole, key=lambda s: (-counts[s], s), default=1.0)
    return [replace(layout, rank=rank, scale=scale, rslora=False, one_alpha=round(scale * rank)) for layout in layouts]


def vllm_targets(model: nn.Module, layouts: list[LayerLayout]) -> list[str]:
    """The ends of the modules' names, which vLLM compares, or full names; an AdapterError if neither can do."""
    names = {layout.peft_name for layout in layouts}
    others = [n for n, module in named_modules(model, remove_duplicate=False) if n not in names and kind_of(module)]
    ends = {name.rpartition(".")[2] for name in names}
    if not any(other.rpartition(".")[2] in ends for other in others):
        return sorted(ends)
    for other in others:
        if twin := next((name for name in names if other.endswith(f".{name}")), None):
            raise AdapterError(
                f"'{twin}' is adapted and '{other}', whose name ends in it, is not: no list tells them apart"
            )
    return sorted(names)
