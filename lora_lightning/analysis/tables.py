"""The analysis as tables: rows of text, for the screen and for the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median

from lora_lightning.analysis.drift import Mean
from lora_lightning.analysis.measures import SHARES, AdapterMeasures
from lora_lightning.analysis.similarity import SIDES, LayerSimilarity, PairSimilarity, Side
from lora_lightning.analysis.strength import Strengths
from lora_lightning.analysis.truncation import Truncation
from lora_lightning.reports.table import Table

SIDE_NAMES = {"A": "A", "B": "B", "update_in": "BA in", "update_out": "BA out"}
FIGURES = {
    "kl": ("KL(base || adapted) per token, in nats", "KL per token"),
    "perplexity_base": ("perplexity of the base", ""),
    "perplexity": ("perplexity of the adapted model", "perplexity"),
    "changed": ("tokens whose top prediction changed", "top changed"),
    "cosine": ("1 - cosine of the pooled output", "1 - cosine"),
    "relative_l2": ("its relative L2", "relative L2"),
}
"""The figures of the drift in words, and shorter for a column of strengths."""


def group_table(adapter: AdapterMeasures) -> Table:
    """A row for each group of layers: medians, and ranks from the least to the most."""
    has_base = any(layer.base for layer in adapter.layers)
    rows = []
    for group, share in sorted(adapter.shares.items(), key=lambda item: -item[1]):
        layers = [layer for layer in adapter.layers if layer.group == group]
        bases = [layer.base for layer in layers if layer.base]
        norms = [base.relative for base in bases] if has_base else [layer.norm for layer in layers]
        row = [group, str(len(layers)), _span(layer.r for layer in layers), f"{share:.1%}", _median(norms)]
        row += [_median(layer.stable_rank for layer in layers)]
        row += [_span(layer.ranks[share] for layer in layers) for share in SHARES]
        rows.append([*row, _median(base.amplification for base in bases)] if has_base else row)
    sizes = ", ".join(f"{count:,} at {share}" for share, count in adapter.parameters_at.items())
    largest = sorted(adapter.layers, key=lambda layer: -layer.norm)[:3] if adapter.norm else []
    held = ", ".join(f"{layer.name} ({layer.norm**2 / adapter.norm**2:.1%})" for layer in largest)
    norm = "over ||W0||_F" if has_base else "of a layer"
    notes = [
        f"share: of ||s B A||_F squared over all layers; norm: ||s B A||_F {norm}; stable: stable rank (medians);"
        " 90%, 95%, 99%: smallest ranks that hold so much of the energy"
        + ("; ampl.: ||s B A||_F over ||U^T W0 V||_F (median)" if has_base else ""),
        f"A and B have {adapter.parameters:,} numbers; smallest ranks would take {sizes} of the energy",
        *([f"most of the update: {held}"] if held else []),
        *adapter.notes,
    ]
    header = ["layers", "n", "r", "share", "norm", "stable", *SHARES, *(["ampl."] if has_base else [])]
    title = f"{adapter.label}: {len(adapter.layers)} adapted layers"
    return Table(title=title, header=header, rows=rows, note="\n".join(notes), code=True)


def layer_table(adapter: AdapterMeasures) -> Table:
    """A row for each layer."""
    header = ["layer", "kind", "r", "s", "||sBA||", "||sBA||_2", "stable rank", *(f"k at {share}" for share in SHARES)]
    rows = []
    for m in adapter.layers:
        kind = f"{m.kind} x {m.entries}" if m.entries > 1 else m.kind
        norms = [_number(value) for value in (m.norm, m.largest, m.stable_rank)]
        rows.append([m.name, kind, str(m.r), f"{m.scale:g}", *norms, *(str(m.ranks[share]) for share in SHARES)])
    if any(layer.base for layer in adapter.layers):
        header += ["||W0||", "/ ||W0||", "U'W0V", "W0's own", "random", "amplification"]
        for row, b in zip(rows, (layer.base for layer in adapter.layers), strict=True):
            values = [b.w0_norm, b.relative, b.in_update, b.in_w0, b.in_random, b.amplification] if b else []
            row.extend([_number(value) for value in values] or [""] * 6)
    return Table(title=f"{adapter.label}, layer by layer", header=header, rows=rows, text=(0, 1), code=True)


def pair_table(pair: PairSimilarity, sides: Sequence[Side] = SIDES) -> Table:
    """A row for each group of layers: the share of directions in common, on each side."""
    header = ["layers", "n", *(f"{SIDE_NAMES[side]} {at}" for side in sides for at in ("1,1", "r,r")), "chance"]
    rows = []
    for group in dict.fromkeys(layer.group for layer in pair.layers):
        members = [layer for layer in pair.layers if layer.group == group]
        row = [group, str(len(members) // len(SIDES))]
        for side in sides:
            of_side = [layer for layer in members if layer.side == side and layer.phi and layer.phi[0]]
            row += [_median((layer.phi[0][0] for layer in of_side), ".2f"), _median(map(_common, of_side), ".2f")]
        chances = {layer.chance for layer in members if layer.side in sides}
        rows.append([*row, "-".join(f"{chance:.1g}" for chance in sorted({min(chances), max(chances)}))])
    note = "phi(1, 1) and phi(r, r) of A's right and B's left singular vectors (medians); chance: of phi(1, 1)"
    if pair.left_out:
        note += f"; {len(pair.left_out)} layers are not in both, or of other shapes"
    title = f"directions that {pair.labels[0]} and {pair.labels[1]} share"
    return Table(title=title, header=header, rows=rows, note=note, code=True)


def _common(layer: LayerSimilarity) -> float:
    """phi(q, q) of the largest q that both adapters have."""
    q = min(len(layer.phi), len(layer.phi[0]))
    return layer.phi[q - 1][q - 1]


def truncation_table(truncation: Truncation) -> Table:
    """Ranks, sizes and errors of a truncation, and its cost in validation."""
    before, after = truncation.parameters
    old, new = (_span(ranks) for ranks in zip(*truncation.ranks.values(), strict=True))
    rows = [
        ["energy kept in each layer", f"{truncation.share:.4g} at least"],
        ["ranks", f"{old} to {new}"],
        ["numbers in A and B", f"{before:,} to {after:,} ({after / before:.1%})"],
        ["missing of the update", f"{truncation.error:.3g} of its norm"],
    ]
    if "validation" in truncation.cost:
        validation = truncation.cost["validation"]
        rows += [[name, f"{x:.5g} to {validation['after'][name]:.5g}"] for name, x in validation["before"].items()]
    if "not_measured" in truncation.cost:
        rows.append(["cost", f"not measured: {truncation.cost['not_measured']}"])
    return Table(title=f"truncated: {truncation.directory}", rows=rows)


def drift_tables(strengths: Strengths) -> tuple[list[Table], list[Table]]:
    """The tables of the facts and, where there are several, of the strengths; then the longer ones of the blocks, where
    there are any, and of the texts that moved most.

    They show the drift at full strength, or at the largest where 1 was not measured.
    """
    full = next((strength for strength in strengths.found if strength.scale == 1), strengths.found[-1])
    drift = full.drift
    facts = [[FIGURES[name][0], _figure(name, mean)] for name, mean in drift.figures.items()]
    counted = f"{drift.texts:,} texts" + (f", {drift.tokens:,} tokens" if drift.tokens else "")
    facts.append(["measured on", f"{strengths.source}: {counted}"])
    at = "" if full.scale == 1 else f" at a strength of {full.scale:g}"
    short = [Table(title=f"How far it moved from the base{at}", rows=facts)]
    if strengths.metric:
        short.append(_strengths_table(strengths))
    blocks = [[name, *(_figure(*item) for item in means.items())] for name, means in drift.layers.items()]
    moved = [[_number(moved.value), moved.text] for moved in drift.most]
    long = [Table(title="By block", header=["block", "1 - cosine", "relative L2"], rows=blocks, code=True)]
    header = [FIGURES[drift.kind][1], "text"]
    return short, [
        *(long if blocks else []),
        Table(title="The texts that moved most", header=header, rows=moved, text=(1,)),
    ]


def _strengths_table(strengths: Strengths) -> Table:
    """A row for each strength: its validation metric and its drift; the best and the smallest good one are marked."""
    names = [name for name in strengths.found[0].drift.figures if FIGURES[name][1]]
    marks = {strengths.chosen: ["enough"]}
    marks[strengths.best] = [*marks.get(strengths.best, []), "best"]
    rows = []
    for strength in strengths.found:
        words = ", ".join([f"{strength.scale:g}", *marks.get(strength.scale, [])])
        figures = [_figure(name, strength.drift.figures[name]) for name in names]
        rows.append([words, _figure(strengths.metric, strength.metrics[strengths.metric]), *figures])
    way = (
        f": lora-lightning export --scale {strengths.chosen:g} writes it"
        if strengths.chosen
        else ", and is the base itself"
    )
    note = (
        f"{strengths.chosen:g} is the smallest strength within one standard error of the best, {strengths.best:g}{way}."
        " After ±: standard errors, of the metric by leaving out a tenth of the rows, of the others over texts."
    )
    header = ["strength", f"val/{strengths.metric}", *(FIGURES[name][1] for name in names)]
    return Table(title="Gain against drift", header=header, rows=rows, note=note)


def _figure(name: str, mean: Mean) -> str:
    """The figure and its error, rounded to the error's second digit; the share `changed` in percent."""
    factor, end = (100, "%") if name == "changed" else (1, "")
    value, error = mean.value * factor, (mean.error or 0.0) * factor
    if not error:
        return f"{value:.4g}{end}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    if digits > 6:
        return f"{value:.2e} ± {error:.0e}{end}"
    return f"{value:.{digits}f} ± {error:.{digits}f}{end}"


def _number(value: float, form: str = ".3g") -> str:
    """The value, by default in three significant digits; `-` for nan."""
    return "-" if math.isnan(value) else f"{value:{form}}"


def _median(values: Iterable[float], form: str = ".3g") -> str:
    known = [value for value in values if not math.isnan(value)]
    return _number(median(known) if known else math.nan, form)


def _span(values: Iterable[int]) -> str:
    """The smallest and the largest value, `4-16`, or the only one."""
    ordered = sorted(values)
    return str(ordered[0]) if ordered[0] == ordered[-1] else f"{ordered[0]}-{ordered[-1]}"
