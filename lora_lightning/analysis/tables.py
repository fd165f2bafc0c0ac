"""The analysis as tables: rows of text, for the screen and for the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median

from lora_lightning.analysis.drift import Mean
from lora_lightning.analysis.measures import SHARES, AdapterMeasures, LayerMeasures
from lora_lightning.analysis.similarity import SIDES, LayerSimilarity, PairSimilarity, Side
from lora_lightning.analysis.strength import Strength, Strengths
from lora_lightning.analysis.truncation import Truncation
from lora_lightning.reports.table import Table

LEGEND = (
    "share: of ||s B A||_F squared over all layers; norm: ||s B A||_F {norm}; stable: stable rank (medians);"
    " 90%, 95%, 99%: smallest ranks that hold so much of the energy"
)
AMPLIFICATION = "; ampl.: ||s B A||_F over ||U^T W0 V||_F (median)"
NAMES = {"A": "A", "B": "B", "update_in": "BA in", "update_out": "BA out"}


def group_table(adapter: AdapterMeasures) -> Table:
    """A row for each group of layers: medians, and ranks from the least to the most."""
    has_base = any(layer.base for layer in adapter.layers)
    header = ["layers", "n", "r", "share", "norm", "stable", *SHARES]
    header += ["ampl."] if has_base else []
    rows = []
    for group, share in sorted(adapter.shares.items(), key=lambda item: -item[1]):
        members = [layer for layer in adapter.layers if layer.group == group]
        relative = [layer.base.relative for layer in members if layer.base]
        norms = relative if has_base else [layer.norm for layer in members]
        row = [group, str(len(members)), span(layer.r for layer in members), f"{share:.1%}", _format_median(norms)]
        row += [_format_median(layer.stable_rank for layer in members)]
        row += [span(layer.ranks[share] for layer in members) for share in SHARES]
        if has_base:
            row.append(_format_median(layer.base.amplification for layer in members if layer.base))
        rows.append(row)
    legend = LEGEND.format(norm="over ||W0||_F" if has_base else "of a layer")
    below = f"{legend}{AMPLIFICATION if has_base else ''}\n{_smaller_ranks_note(adapter)}"
    title = f"{adapter.label}: {len(adapter.layers)} adapted layers"
    return Table(title=title, header=header, rows=rows, note=below, code=True)


def _smaller_ranks_note(adapter: AdapterMeasures) -> str:
    """The adapter's size at the smallest ranks, and the layers with the largest updates."""
    sizes = ", ".join(f"{count:,} at {share}" for share, count in adapter.parameters_at.items())
    largest = sorted(adapter.layers, key=lambda layer: -layer.norm)[:3]
    held = ", ".join(f"{layer.name} ({layer.norm**2 / adapter.norm**2:.1%})" for layer in largest if adapter.norm)
    lines = [f"A and B have {adapter.parameters:,} numbers; smallest ranks would take {sizes} of the energy"]
    return "\n".join([*lines, *([f"most of the update: {held}"] if held else []), *adapter.notes])


def layer_table(adapter: AdapterMeasures) -> Table:
    """A row for each layer."""
    header = ["layer", "kind", "r", "s", "||sBA||", "||sBA||_2", "stable rank", *(f"k at {share}" for share in SHARES)]
    has_base = any(layer.base for layer in adapter.layers)
    if has_base:
        header += ["||W0||", "/ ||W0||", "U'W0V", "W0's own", "random", "amplification"]
    rows = [_layer_row(m, has_base) for m in adapter.layers]
    return Table(title=f"{adapter.label}, layer by layer", header=header, rows=rows, text=(0, 1), code=True)


def _layer_row(m: LayerMeasures, has_base: bool) -> list[str]:
    entries = f" x {m.entries}" if m.entries > 1 else ""
    row = [m.name, f"{m.kind}{entries}", str(m.r), f"{m.scale:g}", number(m.norm), number(m.largest)]
    row += [number(m.stable_rank), *(str(m.ranks[share]) for share in SHARES)]
    if has_base and m.base is None:
        row += [""] * 6
    elif m.base is not None:
        b = m.base
        values = (b.w0_norm, b.relative, b.in_update, b.in_w0, b.in_random, b.amplification)
        row += [number(value) for value in values]
    return row


def pair_table(pair: PairSimilarity, sides: Sequence[Side] = SIDES) -> Table:
    """A row for each group of layers: the share of directions in common, on each side."""
    groups = list(dict.fromkeys(layer.group for layer in pair.layers))
    header = ["layers", "n", *(f"{NAMES[side]} {at}" for side in sides for at in ("1,1", "r,r")), "chance"]
    rows = []
    for group in groups:
        members = [layer for layer in pair.layers if layer.group == group]
        row = [group, str(len(members) // len(SIDES))]
        for side in sides:
            of_side = [layer for layer in members if layer.side == side and layer.phi and layer.phi[0]]
            row += [
                _format_median((layer.phi[0][0] for layer in of_side), ".2f"),
                _format_median(map(_common_similarity, of_side), ".2f"),
            ]
        chances = {layer.chance for layer in members if layer.side in sides}
        rows.append([*row, "-".join(f"{chance:.1g}" for chance in sorted({min(chances), max(chances)}))])
    below = "phi(1, 1) and phi(r, r) of A's right and B's left singular vectors (medians); chance: of phi(1, 1)"
    if pair.left_out:
        below += f"; {len(pair.left_out)} layers are not in both, or of other shapes"
    title = f"directions that {pair.labels[0]} and {pair.labels[1]} share"
    return Table(title=title, header=header, rows=rows, note=below, code=True)


def _common_similarity(layer: LayerSimilarity) -> float:
    """phi(q, q) of the largest q that both adapters have."""
    q = min(len(layer.phi), len(layer.phi[0]))
    return layer.phi[q - 1][q - 1]


def truncation_table(truncation: Truncation) -> Table:
    """Ranks, sizes and errors of a truncation, and its cost in validation."""
    before, after = truncation.parameters
    rows = [
        ["energy kept in each layer", f"{truncation.share:.4g} at least"],
        [
            "ranks",
            f"{span(r for r, _ in truncation.ranks.values())} to {span(r for _, r in truncation.ranks.values())}",
        ],
        ["numbers in A and B", f"{before:,} to {after:,} ({after / before:.1%})"],
        ["missing of the update", f"{truncation.error:.3g} of its norm"],
    ]
    if "validation" in truncation.cost:
        validation = truncation.cost["validation"]
        rows += [[name, f"{x:.5g} to {validation['after'][name]:.5g}"] for name, x in validation["before"].items()]
    if "not_measured" in truncation.cost:
        rows.append(["cost", f"not measured: {truncation.cost['not_measured']}"])
    return Table(title=f"truncated: {truncation.directory}", rows=rows)


def drift_table(strengths: Strengths) -> Table:
    """How far the update of full strength, or the strongest measured one, moved the model."""
    strength = _full_strength(strengths)
    drift = strength.drift
    rows = [[FIGURES[name], _format_mean(mean, share=name == "changed")] for name, mean in drift.figures.items()]
    counted = f"{drift.texts:,} texts" + (f", {drift.tokens:,} tokens" if drift.tokens else "")
    rows.append(["measured on", f"{strengths.source}: {counted}"])
    at = "" if strength.scale == 1 else f" at a strength of {strength.scale:g}"
    return Table(title=f"How far it moved from the base{at}", rows=rows)


def _full_strength(strengths: Strengths) -> Strength:
    """The strength of 1, or the largest where 1 was not measured."""
    return next((strength for strength in strengths.found if strength.scale == 1), strengths.found[-1])


def strengths_table(strengths: Strengths) -> Table:
    """A row for each strength: its validation metric and its drift; the best and the smallest good one are marked."""
    kind = strengths.found[0].drift.kind
    names = ["kl", "perplexity", "changed"] if kind == "kl" else ["cosine", "relative_l2"]
    rows = []
    for strength in strengths.found:
        figures = [_format_mean(strength.drift.figures[name], share=name == "changed") for name in names]
        words = [f"{strength.scale:g}", *(["enough"] if strength.scale == strengths.chosen else [])]
        words += ["best"] if strength.scale == strengths.best else []
        rows.append([", ".join(words), _format_mean(strength.metrics[strengths.metric]), *figures])
    header = ["strength", f"val/{strengths.metric}", *(SHORT[name] for name in names)]
    note = (
        f"{strengths.chosen:g} is the smallest strength within one standard error of the best, {strengths.best:g}:"
        f" lora-lightning export --scale {strengths.chosen:g} writes it. After ±: standard errors, of the metric by"
        " leaving out a tenth of the rows, of the others over texts."
    )
    if strengths.chosen == 0:
        note = note.replace(": lora-lightning export --scale 0 writes it", ", and is the base itself")
    return Table(title="Gain against drift", header=header, rows=rows, note=note)


def blocks_table(strengths: Strengths) -> Table:
    """The drift of each block's pooled output."""
    strength = _full_strength(strengths)
    rows = [[name, *(_format_mean(means[figure]) for figure in means)] for name, means in strength.drift.layers.items()]
    return Table(title="By block", header=["block", "1 - cosine", "relative L2"], rows=rows, code=True)


def moved_table(strengths: Strengths) -> Table:
    """The texts that moved most."""
    strength = _full_strength(strengths)
    rows = [[number(moved.value), moved.text] for moved in strength.drift.most]
    return Table(title="The texts that moved most", header=[SHORT[strength.drift.kind], "text"], rows=rows, text=(1,))


FIGURES = {
    "kl": "KL(base || adapted) per token, in nats",
    "perplexity_base": "perplexity of the base",
    "perplexity": "perplexity of the adapted model",
    "changed": "tokens whose top prediction changed",
    "cosine": "1 - cosine of the pooled output",
    "relative_l2": "its relative L2",
}
SHORT = {
    "kl": "KL per token",
    "perplexity": "perplexity",
    "changed": "top changed",
    "cosine": "1 - cosine",
    "relative_l2": "relative L2",
}


def _format_mean(mean: Mean, *, share: bool = False) -> str:
    """The figure and its error, rounded to the error's second digit."""
    factor, end = (100, "%") if share else (1, "")
    value = mean.value * factor
    if not mean.error:
        return f"{value:.4g}{end}"
    error = mean.error * factor
    digits = max(0, 1 - math.floor(math.log10(error)))
    if digits > 6:
        return f"{value:.2e} ± {error:.0e}{end}"
    return f"{value:.{digits}f} ± {error:.{digits}f}{end}"


def number(value: float) -> str:
    """The value in three significant digits; `-` for nan."""
    return "-" if math.isnan(value) else f"{value:.3g}"


def span(values: Iterable[int]) -> str:
    """The smallest and the largest value, `4-16`, or the only one."""
    ordered = sorted(values)
    return str(ordered[0]) if ordered[0] == ordered[-1] else f"{ordered[0]}-{ordered[-1]}"


def _format_median(values: Iterable[float], form: str = ".3g") -> str:
    known: Sequence[float] = [value for value in values if not math.isnan(value)]
    return f"{median(known):{form}}" if known else "-"
