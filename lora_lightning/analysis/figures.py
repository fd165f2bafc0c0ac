"""Which figures an analysis has."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_lightning.analysis import drawing, plots
from lora_lightning.analysis.measures import AdapterMeasures
from lora_lightning.analysis.similarity import GroupSimilarity, LayerSimilarity, PairSimilarity
from lora_lightning.analysis.truncation import Truncation
from lora_lightning.lora.errors import LoRAError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PAIRS = 6
"""Pairs of adapters that are drawn; the numbers are of all."""
SHOWN = 7
"""Layers in a figure of phi, unless they are named."""


@dataclass(kw_only=True)
class Analysis:
    """All that was found."""

    adapters: list[AdapterMeasures]
    pairs: list[PairSimilarity] = field(default_factory=list)
    groups: dict[str, list[GroupSimilarity]] = field(default_factory=dict)
    """By adapter, phi between its layers."""
    truncation: Truncation | None = None


def figures(found: Analysis, layers: str | None = None) -> dict[str, tuple[str, str, Figure]]:
    """By file name, title, caption and figure."""
    drawn: dict[str, tuple[str, str, Figure]] = {}
    with drawing.styled():
        if all(layer.base for adapter in found.adapters for layer in adapter.layers):
            figure = plots.by_layer(found.adapters, lambda m: m.base.relative if m.base else 0.0, "||sBA|| / ||W0||")
        else:
            figure = plots.by_layer(found.adapters, lambda m: m.norm, "||sBA||")
        drawn["norms"] = (
            "Which layers hold the update",
            "Frobenius norms of s B A, beside W0's where that is known.",
            figure,
        )
        caption = "The share of ||s B A||_F^2 in the top k directions. Thin: a layer. Thick: the median of a group."
        drawn["energy"] = "How many directions hold it", caption, plots.energies(found.adapters)
        for number, adapter in enumerate(found.adapters):
            end = f"-{number + 1}" if len(found.adapters) > 1 else ""
            title = f"The rank that would do, {adapter.label}"
            drawn[f"ranks{end}"] = title, "The smallest rank that holds 95% of the energy.", plots.ranks(adapter)
            if groups := found.groups[adapter.label]:
                caption = f"phi(k, k) of A's first k directions; of random subspaces it is {groups[0].chance:.2g}."
                title = f"Directions that layers share, {adapter.label}"
                drawn[f"layers{end}"] = title, caption, plots.between(adapter.label, groups)
        _draw_amplification(found, drawn)
        _draw_pairs(found, layers, drawn)
    return drawn


def _draw_amplification(found: Analysis, drawn: dict[str, tuple[str, str, Figure]]) -> None:
    adapters = [adapter for adapter in found.adapters if any(layer.base for layer in adapter.layers)]
    if adapters:
        caption = "||s B A||_F / ||U^T W0 V||_F in the update's own directions U, V (the paper's Table 7)."
        figure = plots.by_layer(
            adapters, lambda m: m.base.amplification if m.base else math.nan, "amplification factor"
        )
        drawn["amplification"] = "How much larger it is than W0 there", caption, figure


def _draw_pairs(found: Analysis, layers: str | None, drawn: dict[str, tuple[str, str, Figure]]) -> None:
    for number, pair in enumerate(found.pairs[:MOST_PAIRS]):
        for side, name in (("A", "A"), ("update_out", "BA's outputs")):
            own = [layer for layer in pair.layers if layer.side == side and layer.phi and layer.phi[0]]
            if not own:
                continue
            end = f"-{number + 1}" if len(found.pairs) > 1 else ""
            title = f"Directions of {name} that {pair.labels[0]} and {pair.labels[1]} share"
            caption = (
                "phi(i, j): 1 where the first i directions of one lie within the first j of the other, or around them."
            )
            drawn[f"phi-{side}{end}"] = title, caption, plots.overlaps(pair, _chosen(own, found, layers))


def _chosen(own: list[LayerSimilarity], found: Analysis, layers: str | None) -> list[LayerSimilarity]:
    """Those that are named; else of each group the layer with the largest update, the strongest groups first.

    Raises:
        LoRAError: `layers` matches none.
    """
    if layers is not None:
        named = [layer for layer in own if re.fullmatch(layers, layer.name)]
        if not named:
            raise LoRAError(f"layers: no adapted layer matches '{layers}', such as '{own[0].name}'")
        return named[: plots.MOST_PANELS - 1]
    norms = {layer.name: layer.norm for layer in found.adapters[0].layers}
    best: dict[str, LayerSimilarity] = {}
    for layer in sorted(own, key=lambda layer: -norms.get(layer.name, 0.0)):
        best.setdefault(layer.group, layer)
    return list(best.values())[:SHOWN]
