"""The figures: norms by layer, energy, smallest ranks, amplification, and the directions that adapters share."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lora_lightning.analysis.measures import SHARES, AdapterMeasures, LayerMeasures
from lora_lightning.analysis.similarity import LayerSimilarity, PairSimilarity
from lora_lightning.analysis.spectra import similarity
from lora_lightning.analysis.strength import Strengths
from lora_lightning.analysis.truncation import Truncation
from lora_lightning.lora.errors import LoRAError
from lora_lightning.reports.figures import COLORS, COLUMN, PAGE, Drawing, figure, plot_style, rank_ticks, ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PAIRS = 6
"""Pairs of adapters that have figures; tables have all of them."""
SHOWN = 7
"""Layers in a figure of phi, where the user names none."""
MOST_PANELS = 12
MAP = "viridis"
T = TypeVar("T")
SIDE_NAMES = {"A": "A", "update_out": "BA's outputs"}
"""The sides with figures; tables have all four."""


@dataclass(kw_only=True)
class Analysis:
    """All results of one analysis."""

    adapters: list[AdapterMeasures]
    pairs: list[PairSimilarity] = field(default_factory=list)
    truncation: Truncation | None = None
    drift: Strengths | None = None
    """How far the first adapter moved its model, where that was measured."""


def figures(analysis: Analysis, layers: str | None = None) -> dict[str, Drawing]:
    """The figures by file name, each with title and caption."""
    adapters, drawings = analysis.adapters, dict[str, Drawing]()
    with plot_style():
        if all(layer.base for adapter in adapters for layer in adapter.layers):
            panels = by_layer(adapters, lambda m: m.base.relative if m.base else 0.0, "||sBA|| / ||W0||")
        else:
            panels = by_layer(adapters, lambda m: m.norm, "||sBA||")
        caption = "Frobenius norms of s B A, beside W0's where that is known."
        drawings["norms"] = Drawing("Which layers hold the update", caption, panels)
        caption = "The share of ||s B A||_F^2 in the top k directions. Thin: a layer. Thick: the median of a group."
        drawings["energy"] = Drawing("How many directions hold it", caption, energies(adapters))
        for end, adapter in _numbered(adapters):
            title = f"The rank that would do, {adapter.label}"
            drawings[f"ranks{end}"] = Drawing(title, "The smallest rank that holds 95% of the energy.", ranks(adapter))
        known = [adapter for adapter in adapters if any(layer.base for layer in adapter.layers)]
        if known:
            caption = "||s B A||_F / ||U^T W0 V||_F in the update's own directions U, V (the paper's Table 7)."
            panels = by_layer(known, lambda m: m.base.amplification if m.base else math.nan, "amplification factor")
            drawings["amplification"] = Drawing("How much larger it is than W0 there", caption, panels)
        caption = (
            "phi(i, j): 1 where the first i directions of one are within the first j of the other, or around them."
        )
        for end, pair in _numbered(analysis.pairs)[:MOST_PAIRS]:
            for side, name in SIDE_NAMES.items():
                candidates = [layer for layer in pair.layers if layer.side == side and layer.phi and layer.phi[0]]
                if candidates:
                    title = f"Directions of {name} that {pair.labels[0]} and {pair.labels[1]} share"
                    maps = overlaps(pair, _choose_layers(candidates, analysis, layers))
                    drawings[f"phi-{side}{end}"] = Drawing(title, caption, maps)
        if analysis.drift is not None and analysis.drift.metric:
            drawings["drift"] = gain_against_drift(analysis.drift)
    return drawings


def _numbered(items: Sequence[T]) -> list[tuple[str, T]]:
    """Each item with the end of its figure's name: `-1`, `-2` and so on, or nothing for a single one."""
    return [(f"-{number}" if len(items) > 1 else "", item) for number, item in enumerate(items, 1)]


def gain_against_drift(strengths: Strengths) -> Drawing:
    """The validation metric over the drift, a point for each strength with standard errors of both."""
    fig = figure(COLUMN, 3.0)
    axis = fig.subplots()
    found, is_max = strengths.found, strengths.mode == "max"
    x, y = [point.drift.main for point in found], [point.metrics[strengths.metric] for point in found]
    xs, ys = ([mean.value for mean in means] for means in (x, y))
    x_errors, y_errors = ([mean.error or 0.0 for mean in means] for means in (x, y))
    style: dict[str, Any] = {"elinewidth": 0.7, "capsize": 2, "lw": 1.2, "marker": "o", "ms": 4}
    axis.errorbar(xs, ys, xerr=x_errors, yerr=y_errors, color=COLORS[0], **style)
    for point, at in zip(found, zip(xs, ys, strict=True), strict=True):
        offset = (7, -11 if is_max else 7)
        axis.annotate(f"{point.scale:g}", at, offset, textcoords="offset points", fontsize=7, color="#444")
        if point.scale == strengths.chosen:
            ring: dict[str, Any] = {"ms": 9, "mfc": "none", "mec": COLORS[1], "mew": 1.4}
            axis.plot(*at, "o", label=f"enough: {point.scale:g}", **ring)
    for point, best in zip(found, y, strict=True):
        if point.scale == strengths.best and best.error:
            limit = best.value - best.error if is_max else best.value + best.error
            axis.axhline(limit, color="#888", lw=0.7, ls=":", label="one standard error from the best")
    axis.set_xlabel("KL(base || adapted) per token" if found[0].drift.kind == "kl" else "1 - cosine to the base")
    axis.set_ylabel(f"val/{strengths.metric}")
    axis.margins(0.1)
    fig.legend(loc="outside lower center", ncols=2, frameon=False)
    caption = (
        "Each point is a strength of the update, from the base (0) to what was trained (1) and beyond; bars are"
        f" standard errors. Ring: the smallest strength within one standard error of the best, {strengths.best:g}."
    )
    return Drawing("Gain against drift", caption, fig)


def _choose_layers(candidates: list[LayerSimilarity], analysis: Analysis, layers: str | None) -> list[LayerSimilarity]:
    """The layers that `layers` matches; without it, the layer with the largest update of each group, largest first.

    Raises:
        LoRAError: `layers` matches none.
    """
    if layers is not None:
        named = [layer for layer in candidates if re.fullmatch(layers, layer.name)]
        if not named:
            raise LoRAError(f"layers: no adapted layer matches '{layers}', such as '{candidates[0].name}'")
        return named[: MOST_PANELS - 1]
    norms = {layer.name: layer.norm for layer in analysis.adapters[0].layers}
    best: dict[str, LayerSimilarity] = {}
    for layer in sorted(candidates, key=lambda layer: -norms.get(layer.name, 0.0)):
        best.setdefault(layer.group, layer)
    return list(best.values())[:SHOWN]


def _grid(count: int, columns: int, width: float, top: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure with `count` panels in at most so many columns; `height` is a row's, below `top`."""
    columns = min(columns, count)
    rows = -(-count // columns)
    fig = figure(width, top + height * rows)
    axes = fig.subplots(rows, columns, squeeze=False, **options).flatten().tolist()
    for axis in axes[count:]:
        axis.set_visible(False)
    return fig, axes[:count]


def _groups(adapters: Sequence[AdapterMeasures]) -> list[str]:
    return list(dict.fromkeys(layer.group for adapter in adapters for layer in adapter.layers))


def by_layer(adapters: Sequence[AdapterMeasures], value: Callable[[LayerMeasures], float], label: str) -> Figure:
    """A panel for each group of layers, a bar for each block and adapter."""
    groups = _groups(adapters)[:MOST_PANELS]
    fig, axes = _grid(len(groups), 3, PAGE, 0.5, 1.25, sharey=True)
    for axis, group in zip(axes, groups, strict=True):
        blocks = list(dict.fromkeys(layer.block for a in adapters for layer in a.layers if layer.group == group))
        width = 0.8 / len(adapters)
        for number, adapter in enumerate(adapters):
            of_block = {layer.block: value(layer) for layer in adapter.layers if layer.group == group}
            at = [blocks.index(block) + (number - (len(adapters) - 1) / 2) * width for block in of_block]
            axis.bar(at, list(of_block.values()), width, color=COLORS[number % len(COLORS)], label=adapter.label)
        axis.set_title(group)
        axis.set_xticks(*ticks(blocks if any(blocks) else [""] * len(blocks)))
    for axis in axes[-3:]:
        axis.set_xlabel("block")
    fig.supylabel(label, fontsize=8)
    if len(adapters) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside upper right", ncols=min(len(adapters), 4), frameon=False)
    return fig


def energies(adapters: Sequence[AdapterMeasures]) -> Figure:
    """The share of `||s B A||_F^2` in the top k directions: a thin line for each layer, a thick one for each group."""
    fig, axes = _grid(len(adapters), 3, PAGE if len(adapters) > 1 else 4.6, 0.4, 2.3, sharey=True)
    groups = _groups(adapters)
    for axis, adapter in zip(axes, adapters, strict=True):
        for number, group in enumerate(groups):
            curves = [layer.energy for layer in adapter.layers if layer.group == group and layer.energy]
            color = COLORS[number % len(COLORS)]
            for curve in curves:
                axis.plot(range(1, len(curve) + 1), curve, color=color, linewidth=0.4, alpha=0.35)
            if curves:
                longest = max(map(len, curves))
                middle = torch.tensor([curve + [1.0] * (longest - len(curve)) for curve in curves]).median(0).values
                style: dict[str, Any] = {"linewidth": 1.6, "label": group, "marker": "." if longest <= 16 else ""}
                axis.plot(range(1, longest + 1), middle, color=color, **style)
        for share in SHARES.values():
            axis.axhline(share, color="#999999", linewidth=0.5, linestyle=":", zorder=0)
        axis.set_title(adapter.label)
        axis.set_xlabel("top directions k")
        axis.set_ylim(0, 1.02)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("share of the energy")
    if len(groups) <= len(COLORS):
        axes[-1].legend(loc="lower right", frameon=False, handlelength=1.2)
    return fig


def ranks(adapter: AdapterMeasures, share: str = "95%") -> Figure:
    """The smallest rank that holds `share` of the energy: a row for each group of layers, a column for each block."""
    groups, blocks = _groups([adapter]), list(dict.fromkeys(layer.block for layer in adapter.layers))
    table = torch.full((len(groups), len(blocks)), math.nan)
    for layer in adapter.layers:
        table[groups.index(layer.group), blocks.index(layer.block)] = layer.ranks[share]
    fig = figure(PAGE, 0.9 + 0.24 * len(groups))
    axis = fig.subplots()
    top = max(layer.r for layer in adapter.layers)
    image = axis.imshow(table, cmap=MAP, vmin=0, vmax=top, aspect="auto")
    for row, column in (~table.isnan()).nonzero().tolist() if len(blocks) <= 32 else []:
        value = float(table[row, column])
        shade = "white" if value < 0.6 * top else "black"
        axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color=shade)
    axis.set_yticks(range(len(groups)), groups)
    axis.set_xticks(*ticks([block or "-" for block in blocks], 24))
    axis.set_xlabel("block")
    axis.set_title(f"{adapter.label}: smallest rank that holds {share} of the energy")
    axis.spines[:].set_visible(False)
    fig.colorbar(image, ax=axis, shrink=0.9, label="rank")
    return fig


def overlaps(pair: PairSimilarity, shown: Sequence[LayerSimilarity]) -> Figure:
    """The paper's Figures 3 and 4: phi(i, j) for some layers, and for two random subspaces at the end."""
    panels = [(_wrapped(layer.name), torch.tensor(layer.phi)) for layer in shown]
    panels.append(("random directions", _random_like(shown[0])))
    fig, axes = _grid(len(panels), 4, PAGE, 0.55, 1.75)
    image: Any = None
    for number, (axis, (title, phi)) in enumerate(zip(axes, panels, strict=True)):
        image = axis.imshow(phi, cmap=MAP, vmin=0, vmax=1, origin="lower", aspect="auto")
        axis.set_title(title, fontsize=6.5)
        axis.set_xticks(*rank_ticks(phi.shape[1]))
        axis.set_yticks(*rank_ticks(phi.shape[0]))
        axis.set_xlabel(f"j ({pair.labels[1]})")
        axis.set_ylabel(f"i ({pair.labels[0]})" if number % 4 == 0 else "")
        axis.spines[:].set_visible(False)
    fig.colorbar(image, ax=axes, shrink=0.8, label=r"$\phi(i, j)$")
    side = SIDE_NAMES[shown[0].side]
    fig.suptitle(f"directions of {side} that {pair.labels[0]} and {pair.labels[1]} share", fontsize=8)
    return fig


def _wrapped(name: str) -> str:
    """A dotted name, wrapped at its dots."""
    return "\n".join(textwrap.wrap(name.replace(".", ". "), 26)).replace(". ", ".")


def _random_like(layer: LayerSimilarity) -> torch.Tensor:
    """phi of two random frames in as many dimensions."""
    generator = torch.Generator().manual_seed(0)
    n = round(1 / layer.chance)
    shape = (len(layer.phi), len(layer.phi[0]))
    frames = [torch.randn(n, q, generator=generator, dtype=torch.float64) for q in shape]
    U, V = (torch.linalg.qr(frame)[0] for frame in frames)
    return similarity(U, V)
