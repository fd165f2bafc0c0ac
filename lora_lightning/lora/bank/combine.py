"""One adapter out of several: the factors of every layer that one of them has.

Layers are combined block by block: a block is a pair (A, B) that is multiplied by itself, such as a part of a fused
projection, a group of a convolution's channels, an expert of a stack. One layer is in memory densely at most, and only
for the methods that are defined on dense updates.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_lightning.lora.bank.detached import Held
from lora_lightning.lora.bank.mixing import (
    Loss,
    Pair,
    concatenated,
    dropped,
    elected,
    factored,
    padded,
    summed,
    trimmed,
    truncated,
)
from lora_lightning.lora.bank.recipe import Recipe
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.layers import AdaptedLayer
from lora_lightning.lora.layers.conv import CONVS
from lora_lightning.lora.layers.functional import wide_dtype


@dataclass(frozen=True, kw_only=True)
class Combination:
    """What a combination lost, and how large it is."""

    method: str
    errors: dict[str, float] = field(default_factory=dict)
    """By module, ||wanted - held||_F / ||wanted||_F: what the chosen rank left out. 0 is nothing."""
    ranks: dict[str, int] = field(default_factory=dict)
    """By module."""
    error: float = 0.0
    """The same over all modules together."""


@dataclass
class Mixed:
    """One layer of the combination."""

    name: str
    """In the backbone."""
    like: AdaptedLayer
    """A layer of its kind."""
    whole: bool
    """Whether parts of a fused projection are one block, since the adapters disagree about them."""
    pairs: list[Pair] = field(default_factory=list)
    wanted: float = 0.0
    lost: float = 0.0
    """Squares of the norms of the update that was asked for and of what is missing."""

    @property
    def rank(self) -> int:
        """The rank of the layer as its kind counts it."""
        return int(self.pairs[0][0].shape[0]) * _groups(self.like)

    def count(self, pair: Pair, loss: Loss) -> Pair:
        """Note what one block lost."""
        self.lost, self.wanted = self.lost + loss[0], self.wanted + loss[1]
        return pair


def mix(sources: Mapping[str, Held], weights: Mapping[str, float], recipe: Recipe) -> dict[str, Mixed]:
    """Every layer of the combination by its path, with its factors.

    Raises:
        LoRAError: an adapter has something of which there is no weighted sum, or a rank that does not fit.
    """
    for name, held in sources.items():
        _refuse(name, held)
    layers = {name: held.layers() for name, held in sources.items()}
    paths = list(dict.fromkeys(path for own in layers.values() for path in own))
    if not paths:
        raise LoRAError(f"nothing to combine: none of {', '.join(sources)} adapts a layer by A and B")
    mixed = {}
    for path in paths:
        own = {name: found[path] for name, found in layers.items() if path in found}
        mixed[path] = _mix_layer(path, own, [weights[name] for name in own], recipe)
    return mixed


def _mix_layer(path: str, layers: dict[str, AdaptedLayer], weights: list[float], recipe: Recipe) -> Mixed:
    like = next(iter(layers.values()))
    parts = {layer.lora_settings.slices for layer in layers.values()}
    layer = Mixed(name=like.lora_name(path), like=like, whole=len(parts) > 1)
    if layer.whole and len(like.adapted_parameters(like.lora_owner, like.lora_settings)) > 1:
        raise LoRAError(f"'{layer.name}' holds its parts apart, and the adapters take different ones: no common form")
    blocks = list(zip(*(scaled_blocks(own, whole=layer.whole) for own in layers.values()), strict=True))
    if recipe.on_factors:
        done = [_of_factors(pairs, weights, recipe, layer) for pairs in blocks]
    else:
        done = _of_updates(blocks, list(layers), weights, recipe, layer)
    rank = max(int(A.shape[0]) for A, _ in done)
    layer.pairs = [padded(pair, rank) for pair in done]
    return layer


def _of_factors(pairs: Sequence[Pair], weights: list[float], recipe: Recipe, layer: Mixed) -> Pair:
    A, B = concatenated(pairs, weights)
    if recipe.rank is None:
        return A, B
    pair, loss = truncated(A, B, _block_rank(recipe.rank, layer))
    return layer.count(pair, loss)


def _of_updates(
    blocks: list[tuple[Pair, ...]], names: list[str], weights: list[float], recipe: Recipe, layer: Mixed
) -> list[Pair]:
    """Trimming and dropping look at a layer's whole update, all blocks together."""
    dense = [[B @ A for A, B in pairs] for pairs in blocks]
    shapes = [own[0].shape for own in dense]
    updates = torch.stack([torch.cat([own[i].flatten() for own in dense]) for i in range(len(names))])
    weight = updates.new_tensor(weights)
    if recipe.drops:
        draws = torch.stack([_draws(recipe.seed, name, layer.name, updates) for name in names])
        updates = dropped(updates, recipe.density, draws)
    else:
        updates = trimmed(updates, recipe.density)
    merged = elected(updates, weight) if recipe.elects else summed(updates, weight)
    rank = None if recipe.rank is None else _block_rank(recipe.rank, layer)
    flat = torch.split(merged, [shape.numel() for shape in shapes])
    return [layer.count(*factored(block.view(shape), rank)) for block, shape in zip(flat, shapes, strict=True)]


def scaled_blocks(layer: AdaptedLayer, *, whole: bool) -> list[Pair]:
    """The layer's update as the products `B A` of its blocks, with s in B; a subtracted start is a part of A and B."""
    scale, dtype = layer.lora_settings.scale, wide_dtype(layer.lora_A)
    if whole:
        own = layer.to_peft()
        pairs = [(own["lora_A"], own["lora_B"])]
    else:
        pairs = blocks(layer)
    if layer.lora_A0 is not None and layer.lora_B0 is not None:  # linear layers without parts: one block
        (A, B), A0, B0 = pairs[0], layer.lora_A0, layer.lora_B0
        pairs = [(torch.cat([A, A0]), torch.cat([B, -B0], dim=1))]
    return [(A.detach().to(dtype), B.detach().to(dtype) * scale) for A, B in pairs]


def blocks(layer: AdaptedLayer) -> list[Pair]:
    """Views of A and B, block by block: what is written into them is written into the layer."""
    if not isinstance(layer, CONVS):
        return layer.factor_pairs()
    groups = _groups(layer)
    A = torch.unflatten(layer.lora_A.flatten(1), 0, (groups, -1))
    B = torch.unflatten(layer.lora_B.flatten(1), 0, (groups, -1))
    return list(zip(A, B, strict=True))


def report(mixed: Mapping[str, Mixed], method: str) -> Combination:
    """The errors of all layers."""
    lost, wanted = sum(m.lost for m in mixed.values()), sum(m.wanted for m in mixed.values())
    return Combination(
        method=method,
        errors={m.name: _ratio(m.lost, m.wanted) for m in mixed.values()},
        ranks={m.name: m.rank for m in mixed.values()},
        error=_ratio(lost, wanted),
    )


def _ratio(lost: float, wanted: float) -> float:
    return math.sqrt(lost / wanted) if wanted > 0 else 0.0


def _refuse(name: str, held: Held) -> None:
    reasons = {
        "lora_magnitude_vector": "has DoRA's magnitudes, which rescale W0 and are no term of a sum",
        "lora_B_bias": "has a bias of B, which is no part of the weight's update",
        "lora_trained_bias": "has a trained bias, which is no part of the weight's update",
        "lora_tokens": "has trained token rows, which replace rows of W0",
    }
    for share in held.shares:
        for tensor, reason in reasons.items():
            if share.stores["_parameters"].get(tensor) is not None:
                raise LoRAError(f"cannot combine '{name}': its '{share.path}' {reason}: leave it out")


def _block_rank(rank: int, layer: Mixed) -> int:
    groups = _groups(layer.like)
    if rank % groups:
        raise LoRAError(f"rank={rank} is no multiple of the {groups} groups of the convolution '{layer.name}'")
    return rank // groups


def _groups(layer: AdaptedLayer) -> int:
    return layer.groups if isinstance(layer, CONVS) else 1


def _draws(seed: int, adapter: str, module: str, like: Tensor) -> Tensor:
    """Uniform numbers for one module of one adapter, the same on every device and in whatever order they are drawn."""
    digest = hashlib.sha256(f"{seed}/{adapter}/{module}".encode()).digest()
    random = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(like.shape[1], generator=random, dtype=torch.float64).to(like.device, like.dtype)
