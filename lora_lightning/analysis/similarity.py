"""The similarity of two adapters' directions (the paper's section 7.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_lightning.analysis.adapters import Adapter, Factors
from lora_lightning.analysis.layer_groups import places
from lora_lightning.lora.frozen.spectrum import (
    Pair,
    accumulate_similarity,
    directions,
    random_similarity,
    similarity,
    spectrum,
)

Side = Literal["A", "B", "update_in", "update_out"]
SIDES: tuple[Side, ...] = ("A", "B", "update_in", "update_out")
"""The directions: A's right singular vectors (the paper's), B's left ones, and both of B A."""


@dataclass(frozen=True, kw_only=True)
class LayerSimilarity:
    """One layer in two adapters."""

    name: str
    group: str
    side: Side
    phi: list[list[float]]
    """phi at [i - 1][j - 1], of the first i directions of the first adapter and the first j of the second."""
    chance: float
    """`phi(1, 1)` of two random directions; `phi(i, j)` of random subspaces is max(i, j) times that."""


@dataclass(frozen=True, kw_only=True)
class PairSimilarity:
    """Two adapters."""

    labels: tuple[str, str]
    layers: list[LayerSimilarity]
    left_out: list[str]
    """Layers that only one of them has, or whose shapes differ."""


def compare_adapters(
    first: Adapter, second: Adapter, advance: Callable[[int], None] = lambda _: None
) -> PairSimilarity:
    """phi for every layer that both adapters have, on all sides."""
    others, place_of = {layer.name: layer for layer in second.factors}, places(layer.name for layer in first.factors)
    compared, left_out = [], [name for name in others if name not in {layer.name for layer in first.factors}]
    for layer in first.factors:
        other = others.get(layer.name)
        advance(1)
        if other is None or other.shape != layer.shape or len(other.pairs) != len(layer.pairs):
            left_out.append(layer.name)
            continue
        compared += [_compare_layers(layer, other, side, place_of[layer.name].group) for side in SIDES]
    return PairSimilarity(labels=(first.label, second.label), layers=compared, left_out=left_out)


def _compare_layers(layer: Factors, other: Factors, side: Side, group: str) -> LayerSimilarity:
    m, k = layer.shape
    return LayerSimilarity(
        name=layer.name,
        group=group,
        side=side,
        phi=_phi(
            [side_directions(p, side) for p in layer.pairs], [side_directions(p, side) for p in other.pairs]
        ).tolist(),
        chance=random_similarity(1, 1, (k if side in ("A", "update_in") else m) * len(layer.pairs)),
    )


def side_directions(pair: Pair, side: Side) -> tuple[Tensor, Tensor]:
    """Directions (n, q) in the order of their singular values (q,)."""
    A, B = pair
    if side == "A":
        return directions(A.mT)
    if side == "B":
        return directions(B)
    whole = spectrum(A, B)
    return (whole.V if side == "update_in" else whole.U), whole.S


def _phi(firsts: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> Tensor:
    """phi of all entries of a stack together: directions of different entries are orthogonal, and all are sorted."""
    if len(firsts) == 1:
        return similarity(firsts[0][0], others[0][0])
    blocks = [(U.mT @ V).square() for (U, _), (V, _) in zip(firsts, others, strict=True)]
    squares: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    rows = torch.cat([S for _, S in firsts]).argsort(descending=True)
    columns = torch.cat([S for _, S in others]).argsort(descending=True)
    return accumulate_similarity(squares[rows][:, columns])
