"""Combine several adapters into one: the weighted sum of their updates, exactly or at a chosen rank.

The sum `sum_i w_i s_i B_i A_i` is computed block by block: a block is a pair (A, B) with a separate product, such as a
part of a fused projection, a group of a convolution's channels, an expert of a stack. Updates are never formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lightning.lora.config import LayerSettings, LoRAConfig
from lora_lightning.lora.errors import ConfigError, LoRAError, did_you_mean
from lora_lightning.lora.formats.peft.load import exact_config, load_tensors
from lora_lightning.lora.frozen.spectrum import Pair, pad_pair, spectrum, subtract_init
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.inject import adapted_layers, grafted_modules, modules_of_kind
from lora_lightning.lora.layers import AdaptedLayer, SavedCopy
from lora_lightning.lora.layers.conv import CONVS
from lora_lightning.lora.layers.functional import wide_dtype
from lora_lightning.lora.layers.trained.module_copy import COPY

METHODS = ("concat", "svd")
REMOVED = {
    "ties": "ties_svd",
    "dare": "dare_linear_svd",
    "dare_ties": "dare_ties_svd",
    "magnitude": "magnitude_prune_svd",
}
"""Methods of earlier versions, and PEFT's names for them."""

Loss = tuple[float, float]
"""Squared Frobenius norms: of the error, and of the exact sum."""


@dataclass(frozen=True, kw_only=True)
class Combination:
    """The ranks of a combination, and ||exact - combined||_F / ||exact||_F, by module and over all together."""

    method: str
    errors: dict[str, float]
    ranks: dict[str, int]
    error: float


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of an adapter, or of a combination.

    Its update is the products `B A` of `blocks`, with s in B, or of the one in `whole`, for adapters that disagree
    about the parts of a fused projection.
    """

    name: str
    settings: LayerSettings
    groups: int
    """Of a convolution's channels; 1 for other kinds."""
    weights: int
    """The number of weights that it adapts."""
    blocks: list[Pair]
    whole: list[Pair]
    loss: Loss = (0.0, 0.0)

    @property
    def rank(self) -> int:
        """The layer's r; with groups, the sum over the groups."""
        return int(self.blocks[0][0].shape[0]) * self.groups


class Source(NamedTuple):
    """An adapter that is combined, or the combination: layers, and copies of `modules_to_save`, by their paths."""

    layers: dict[str, Layer]
    heads: dict[str, dict[str, Tensor]]


def check_request(
    weights: Mapping[str, float], names: list[str], method: str, rank: int | None, removed: Mapping[str, Any]
) -> None:
    """Raise a ConfigError unless this asks for a valid weighted sum; `removed` holds arguments of removed methods."""
    if method in REMOVED or removed:
        in_peft = REMOVED.get(method)
        what, name = (f"method {method!r}", f" ({in_peft!r})") if in_peft else (", ".join(removed), "")
        raise ConfigError(
            f"{what} was removed: take 'concat' or 'svd', or let PEFT combine the saved adapters{name} and load that"
        )
    if method not in METHODS:
        near = did_you_mean(str(method), METHODS)
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}{near}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank must be a whole number of at least 1, got {rank!r}")
    if method == "svd" and rank is None:
        raise ConfigError("method 'svd' needs the rank of the result: rank=8; 'concat' keeps all of it")
    if method == "concat" and rank is not None:
        raise ConfigError("method 'concat' has the ranks of the adapters added up: leave rank out, or use 'svd'")
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigError(f"weights must map names of adapters to numbers, such as {{'a': 0.7}}, got {weights!r}")
    for name, weight in weights.items():
        if name not in names:
            known = f"{', '.join(names) or 'none'}{did_you_mean(str(name), names)}"
            raise ConfigError(f"no adapter '{name}' here, there are {known}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"the weight of '{name}' must be a finite number, got {weight!r}")


def read_adapter(name: str, model: nn.Module) -> Source:
    """The adapter in `model`; a LoRAError where it trains what is no term of a sum."""
    reasons = {
        "lora_magnitude_vector": "has DoRA's magnitudes, which rescale W0 and are no term of a sum",
        "lora_B_bias": "has a bias of B, which is no part of the weight's update",
        "lora_trained_bias": "has a trained bias, which is no part of the weight's update",
        "lora_tokens": "has trained token rows, which replace rows of W0",
    }
    for path, module in grafted_modules(model):
        if refused := next((tensor for tensor in module.lora_tensors() if tensor in reasons), None):
            raise LoRAError(f"cannot combine '{name}': its '{path}' {reasons[refused]}: leave it out")
    heads = {path: module.lora_copy.state_dict() for path, module in modules_of_kind(model, SavedCopy)}
    return Source(layers={path: _read_layer(path, layer) for path, layer in adapted_layers(model)}, heads=heads)


def _read_layer(path: str, layer: AdaptedLayer) -> Layer:
    def scale(first: Pair, *more: Pair) -> list[Pair]:
        # A subtracted init is a part of A and B; only layers of one block have one.
        pairs = [subtract_init(first, layer.lora_A0, layer.lora_B0), *more]
        return [(A.detach().to(dtype), B.detach().to(dtype) * settings.scale) for A, B in pairs]

    settings, dtype, tensors = layer.lora_settings, wide_dtype(layer.lora_A), layer.to_peft()
    blocks, groups = scale(*layer.factor_pairs()), layer.groups if isinstance(layer, CONVS) else 1
    whole = scale((tensors["lora_A"], tensors["lora_B"])) if settings.slices else blocks
    weights, name = len(layer.adapted_parameters()), layer.lora_name(path)
    return Layer(name=name, settings=settings, groups=groups, weights=weights, blocks=blocks, whole=whole)


def combine_adapters(sources: Mapping[str, Source], weights: Mapping[str, float], rank: int | None) -> Source:
    """The weighted sum, at `rank` or the sum of the ranks; a LoRAError where there is none."""
    paths = list(dict.fromkeys(path for source in sources.values() for path in source.layers))
    if not paths:
        raise LoRAError(f"nothing to combine: none of {', '.join(sources)} adapts a layer by A and B")
    layers = {}
    for path in paths:
        terms = {name: source.layers[path] for name, source in sources.items() if path in source.layers}
        layers[path] = _combine_layer(list(terms.values()), [weights[name] for name in terms], rank)
    return Source(layers=layers, heads=_common_heads(sources, layers))


def _combine_layer(terms: list[Layer], weights: Sequence[float], rank: int | None) -> Layer:
    first = terms[0]
    is_whole = len({term.settings.slices for term in terms}) > 1
    if is_whole and first.weights > 1:
        raise LoRAError(f"'{first.name}' holds its parts apart, and the adapters take different ones: no common form")
    if rank is not None and rank % first.groups:
        raise LoRAError(f"rank={rank} is no multiple of the {first.groups} groups of the convolution '{first.name}'")
    pairs, lost, wanted = [], 0.0, 0.0
    for block in zip(*(term.whole if is_whole else term.blocks for term in terms), strict=True):
        A, B = torch.cat([A for A, _ in block]), torch.cat([B * w for (_, B), w in zip(block, weights, strict=True)], 1)
        if rank is not None:
            (A, B), loss = truncate_pair(A, B, rank // first.groups)
            lost, wanted = lost + loss[0], wanted + loss[1]
        pairs.append((A, B))
    most = max(len(A) for A, _ in pairs)
    settings = replace(first.settings, slices=None) if is_whole else first.settings
    blocks = [pad_pair((A, B), most - len(A)) for A, B in pairs]
    return replace(first, settings=settings, blocks=blocks, loss=(lost, wanted))


def truncate_pair(A: Tensor, B: Tensor, rank: int) -> tuple[Pair, Loss]:
    """The best approximation of `B A` of rank `rank` (Eckart and Young), and its loss."""
    svd = spectrum(A, B)
    root, squares = svd.S[:rank].sqrt(), svd.S.square()
    pair = ((svd.V[:, :rank] * root).mT.to(A), (svd.U[:, :rank] * root).to(B))
    return pad_pair(pair, min(rank, len(A)) - len(pair[0])), (float(squares[rank:].sum()), float(squares.sum()))


def _common_heads(sources: Mapping[str, Source], layers: Mapping[str, Layer]) -> dict[str, dict[str, Tensor]]:
    """The copies of `modules_to_save`; a LoRAError where adapters have different ones, or adapt inside one."""
    heads: dict[str, tuple[str, dict[str, Tensor]]] = {}
    for name, source in sources.items():
        for path, state in source.heads.items():
            other, there = heads.setdefault(path, (name, state))
            if any(not torch.equal(tensor, there[key]) for key, tensor in state.items()):
                raise LoRAError(
                    f"'{other}' and '{name}' both saved '{path}' in full, with different values, which have no sum:"
                    " combine adapters that share it, or save them without it"
                )
    for path, (name, _) in heads.items():
        if adapted := [layer.name for layer in layers.values() if f"{layer.name}.".startswith(f"{path}.")]:
            raise LoRAError(f"'{name}' saved '{path}' in full, and another adapts '{adapted[0]}' by A and B: no sum")
    return {path: state for path, (_, state) in heads.items()}


def config_of(combined: Source) -> LoRAConfig:
    """The config that injects these layers with their ranks and a scale of 1."""
    layers = combined.layers.values()
    ranks = {layer.name: layer.rank for layer in layers}
    return exact_config(
        ranks,
        {name: float(rank) for name, rank in ranks.items()},
        {layer.name: layer.settings.slices.to_spec() for layer in layers if layer.settings.slices},
        target_parameters=[layer.name for layer in layers if layer.settings.parameter] or None,
        modules_to_save=[*combined.heads] or None,
    )


@torch.no_grad()
def fill(model: nn.Module, combined: Source) -> None:
    """Write the combination into the model that was injected for it."""
    for path, layer in adapted_layers(model):
        for (A, B), (layer_a, layer_b) in zip(combined.layers[path].blocks, layer.factor_pairs(), strict=True):
            layer_a.copy_(A)
            layer_b.copy_(B)
    heads = {f"{path}.{COPY}.{key}": tensor for path, state in combined.heads.items() for key, tensor in state.items()}
    load_tensors(model, {**adapter_tensors(model), **heads})


def report(combined: Source, method: str) -> Combination:
    """The error of each layer, and of all together."""

    def error(*layers: Layer) -> float:
        lost, wanted = (sum(layer.loss[i] for layer in layers) for i in (0, 1))
        return math.sqrt(lost / wanted) if wanted else 0.0

    layers = {layer.name: layer for layer in combined.layers.values()}
    return Combination(
        method=method,
        errors={name: error(layer) for name, layer in layers.items()},
        ranks={name: layer.rank for name, layer in layers.items()},
        error=error(*layers.values()),
    )
