"""Combine several adapters into one: the weighted sum of their updates, exactly or at a chosen rank.

The sum `sum_i w_i s_i B_i A_i` is computed block by block: a block is a pair (A, B) with a separate product, such as a
part of a fused projection, a group of a convolution's channels, an expert of a stack. Updates are never formed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.bank.detached import Share, adapted_twins
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import ConfigError, LoRAError, did_you_mean
from lora_lightning.lora.formats.peft.load import load_tensors
from lora_lightning.lora.formats.peft.resolve import exact_pattern
from lora_lightning.lora.frozen.spectrum import Pair, spectrum, subtract_init
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.lora.layers import AdaptedLayer, LoRAParameter, SavedCopy
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
    """The errors and the ranks of a combination."""

    method: str
    errors: dict[str, float] = field(default_factory=dict)
    """By module, ||exact - combined||_F / ||exact||_F: the error of the chosen rank."""
    ranks: dict[str, int] = field(default_factory=dict)
    error: float = 0.0
    """The same over all modules together."""


@dataclass
class CombinedLayer:
    """One layer of the combination."""

    name: str
    like: AdaptedLayer
    """The first adapter's layer, for its kind and shapes."""
    whole: bool
    """Whether parts of a fused projection are one block, since the adapters disagree about them."""
    pairs: list[Pair]
    loss: Loss

    @property
    def rank(self) -> int:
        """The layer's r; with groups, the sum over the groups."""
        return int(self.pairs[0][0].shape[0]) * _groups(self.like)


def check_request(
    weights: Mapping[str, float], names: list[str], method: str, rank: int | None, removed: Mapping[str, Any]
) -> None:
    """Raise a ConfigError unless this asks for a valid weighted sum; `removed` holds arguments of removed methods."""
    if method in REMOVED or removed:
        in_peft = REMOVED.get(method)
        raise ConfigError(
            f"{f'method {method!r}' if in_peft else ', '.join(removed)} was removed: take 'concat' or 'svd', or let"
            f" PEFT combine the saved adapters{f' ({in_peft!r})' if in_peft else ''} by add_weighted_adapter, and load"
            " that"
        )
    if method not in METHODS:
        raise ConfigError(
            f"method must be one of {', '.join(METHODS)}, got {method!r}{did_you_mean(str(method), METHODS)}"
        )
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
            raise ConfigError(
                f"no adapter '{name}' here, there are {', '.join(names) or 'none'}{did_you_mean(str(name), names)}"
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"the weight of '{name}' must be a finite number, got {weight!r}")


def combine_layers(
    sources: Mapping[str, list[Share]], weights: Mapping[str, float], rank: int | None
) -> dict[str, CombinedLayer]:
    """Every layer of the weighted sum by its path, at `rank` or the sum of the ranks; a LoRAError where it has none."""
    for name, held in sources.items():
        _refuse(name, held)
    layers = {name: adapted_twins(held) for name, held in sources.items()}
    paths = list(dict.fromkeys(path for adapted in layers.values() for path in adapted))
    if not paths:
        raise LoRAError(f"nothing to combine: none of {', '.join(sources)} adapts a layer by A and B")
    combined = {}
    for path in paths:
        adapted = {name: by_path[path] for name, by_path in layers.items() if path in by_path}
        combined[path] = _combine_layer(path, list(adapted.values()), [weights[name] for name in adapted], rank)
    return combined


def _combine_layer(path: str, layers: list[AdaptedLayer], weights: Sequence[float], rank: int | None) -> CombinedLayer:
    like, name = layers[0], layers[0].lora_name(path)
    whole = len({layer.lora_settings.slices for layer in layers}) > 1
    if whole and len(like.adapted_parameters(like.lora_owner, like.lora_settings)) > 1:
        raise LoRAError(f"'{name}' holds its parts apart, and the adapters take different ones: no common form")
    groups = _groups(like)
    if rank is not None and rank % groups:
        raise LoRAError(f"rank={rank} is no multiple of the {groups} groups of the convolution '{name}'")
    pairs, lost, wanted = [], 0.0, 0.0
    for block in zip(*(_scaled_blocks(layer, whole=whole) for layer in layers), strict=True):
        A, B = torch.cat([A for A, _ in block]), torch.cat([B * w for (_, B), w in zip(block, weights, strict=True)], 1)
        if rank is not None:
            (A, B), loss = truncate_pair(A, B, rank // groups)
            lost, wanted = lost + loss[0], wanted + loss[1]
        pairs.append((A, B))
    most = max(A.shape[0] for A, _ in pairs)
    return CombinedLayer(name, like, whole, [pad_pair(pair, most) for pair in pairs], (lost, wanted))


def truncate_pair(A: Tensor, B: Tensor, rank: int) -> tuple[Pair, Loss]:
    """The best approximation of `B A` of rank `rank` (Eckart and Young), and its loss."""
    svd = spectrum(A, B)
    root, squares = svd.S[:rank].sqrt(), svd.S.square()
    pair = ((svd.V[:, :rank] * root).mT.to(A), (svd.U[:, :rank] * root).to(B))
    return pad_pair(pair, min(rank, len(A))), (float(squares[rank:].sum()), float(squares.sum()))


def pad_pair(pair: Pair, rank: int) -> Pair:
    """The same update, with zeros in A and B up to `rank`."""
    more = rank - pair[0].shape[0]
    return (F.pad(pair[0], (0, 0, 0, more)), F.pad(pair[1], (0, more))) if more else pair


def _scaled_blocks(layer: AdaptedLayer, *, whole: bool) -> list[Pair]:
    """The layer's update as the products `B A` of its blocks, with s in B; a subtracted init is a part of A and B."""
    scale, dtype = layer.lora_settings.scale, wide_dtype(layer.lora_A)
    tensors = layer.to_peft() if whole else {}
    first, *more = [(tensors["lora_A"], tensors["lora_B"])] if whole else layer.factor_pairs()
    pairs = [subtract_init(first, layer.lora_A0, layer.lora_B0), *more]  # only layers of one block subtract an init
    return [(A.detach().to(dtype), B.detach().to(dtype) * scale) for A, B in pairs]


def _groups(layer: AdaptedLayer) -> int:
    return layer.groups if isinstance(layer, CONVS) else 1


def _refuse(name: str, held: list[Share]) -> None:
    reasons = {
        "lora_magnitude_vector": "has DoRA's magnitudes, which rescale W0 and are no term of a sum",
        "lora_B_bias": "has a bias of B, which is no part of the weight's update",
        "lora_trained_bias": "has a trained bias, which is no part of the weight's update",
        "lora_tokens": "has trained token rows, which replace rows of W0",
    }
    for share in held:
        for tensor, reason in reasons.items():
            if share.stores["_parameters"].get(tensor) is not None:
                raise LoRAError(f"cannot combine '{name}': its '{share.path}' {reason}: leave it out")


def saved_tensors(
    sources: Mapping[str, list[Share]], combined: Mapping[str, CombinedLayer]
) -> dict[str, dict[str, Tensor]]:
    """The copies of `modules_to_save`, by the module's name.

    Raises:
        LoRAError: two adapters have different values for one module, or one adapts inside what another saved.
    """
    saved: dict[str, tuple[str, dict[str, Tensor]]] = {}
    for name, held in sources.items():
        for share in held:
            if not issubclass(share.grafted, SavedCopy):
                continue
            copy: nn.Module = share.stores["_modules"][COPY]
            state = {key: tensor.detach() for key, tensor in copy.state_dict().items()}
            other, there = saved.setdefault(share.path, (name, state))
            if any(not torch.equal(tensor, there[key]) for key, tensor in state.items()):
                raise LoRAError(
                    f"'{other}' and '{name}' both saved '{share.path}' in full, with different values, and a head has"
                    f" no update to add: combine adapters that share it, or save them without it"
                )
    for path, (name, _) in saved.items():
        adapted = [layer.name for layer in combined.values() if f"{layer.name}.".startswith(f"{path}.")]
        if adapted:
            raise LoRAError(
                f"'{name}' saved '{path}' in full, and another adapts '{adapted[0]}' by A and B: combine adapters that"
                f" train it in one way"
            )
    return {path: state for path, (_, state) in saved.items()}


def config_of(combined: Mapping[str, CombinedLayer], saved: list[str]) -> LoRAConfig:
    """The config that injects these layers with their ranks and a scale of 1."""
    ranks = {exact_pattern(layer.name): layer.rank for layer in combined.values()}
    bare = [layer.name for layer in combined.values() if isinstance(layer.like, LoRAParameter)]
    modules = [layer.name for layer in combined.values() if layer.name not in bare]
    specs = {layer.name: layer.like.lora_settings.slices for layer in combined.values() if not layer.whole}
    return LoRAConfig(
        target_modules=f"(?:{'|'.join(map(re.escape, modules))})" if modules else [],
        target_parameters=bare or None,
        modules_to_save=saved or None,
        slices={exact_pattern(name): spec.to_spec() for name, spec in specs.items() if spec},
        rank_pattern=ranks,
        alpha_pattern={pattern: float(rank) for pattern, rank in ranks.items()},
    )


@torch.no_grad()
def fill(model: nn.Module, combined: Mapping[str, CombinedLayer], saved: Mapping[str, dict[str, Tensor]]) -> None:
    """Write the combination into the model that was injected for it."""
    for path, layer in adapted_layers(model):
        for (A, B), (layer_a, layer_b) in zip(combined[path].pairs, layer.factor_pairs(), strict=True):
            layer_a.copy_(A)
            layer_b.copy_(B)
    copies = {f"{path}.{COPY}.{key}": tensor for path, state in saved.items() for key, tensor in state.items()}
    load_tensors(model, {**adapter_tensors(model), **copies})


def report(combined: Mapping[str, CombinedLayer], method: str) -> Combination:
    """The error of each layer, and of all together."""

    def error(*layers: CombinedLayer) -> float:
        lost, wanted = (sum(layer.loss[i] for layer in layers) for i in (0, 1))
        return math.sqrt(lost / wanted) if wanted else 0.0

    errors = {layer.name: error(layer) for layer in combined.values()}
    ranks = {layer.name: layer.rank for layer in combined.values()}
    return Combination(method=method, errors=errors, ranks=ranks, error=error(*combined.values()))
