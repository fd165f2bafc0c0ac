"""The similarity of two adapters' directions (the paper's section 7.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_lightning.analysis.adapters import Adapter, Factors, places
from lora_lightning.analysis.spectra import accumulate_similarity, directions, random_similarity
from lora_lightning.lora.frozen.spectrum import spectrum

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
    first: Adapter, second: Adapter, watch: Callable[[list[Factors]], Iterable[Factors]] = iter
) -> PairSimilarity:
    """phi for every layer that both adapters have, on all sides."""
    others, place_of = {layer.name: layer for layer in second.factors}, places(layer.name for layer in first.factors)
    compared, left_out = [], [name for name in others if name not in place_of]
    for layer in watch(first.factors):
        other = others.get(layer.name)
        if other is None or other.shape != layer.shape or len(other.pairs) != len(layer.pairs):
            left_out.append(layer.name)
            continue
        ours, theirs = side_directions(layer), side_directions(other)
        for side in SIDES:
            phi = _phi(ours[side], theirs[side]).tolist()
            size = layer.shape[1 if side in ("A", "update_in") else 0] * len(layer.pairs)
            chance = random_similarity(1, 1, size)
            group, _ = place_of[layer.name]
            compared.append(LayerSimilarity(name=layer.name, group=group, side=side, phi=phi, chance=chance))
    return PairSimilarity(labels=(first.label, second.label), layers=compared, left_out=left_out)


def side_directions(layer: Factors) -> dict[Side, list[tuple[Tensor, Tensor]]]:
    """Directions (n, q) in the order of their singular values (q,), of each entry of the layer."""
    updates = [spectrum(A, B) for A, B in layer.pairs]
    return {
        "A": [directions(A.mT) for A, _ in layer.pairs],
        "B": [directions(B) for _, B in layer.pairs],
        "update_in": [(s.V, s.S) for s in updates],
        "update_out": [(s.U, s.S) for s in updates],
    }


def _phi(firsts: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> Tensor:
    """phi of all entries of a stack together: directions of different entries are orthogonal, and all are sorted."""
    blocks = [(U.mT @ V).square() for (U, _), (V, _) in zip(firsts, others, strict=True)]
    squares: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    rows, columns = (
        torch.cat([S for _, S in found]).argsort(descending=True, stable=True) for found in (firsts, others)
    )
    return accumulate_similarity(squares[rows][:, columns])
