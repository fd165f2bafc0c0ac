"""`lora-lightning analyze`: tables, figures and numbers of adapters, and on request a smaller adapter."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.progress import track

from lora_lightning.analysis import tables
from lora_lightning.analysis.drift_inputs import MOST
from lora_lightning.analysis.measures import measure_adapter
from lora_lightning.analysis.plots import Analysis, figures
from lora_lightning.analysis.similarity import compare_adapters
from lora_lightning.analysis.strength import parse_scales
from lora_lightning.analysis.truncation import MARK, WHAT, check_share
from lora_lightning.analysis.truncation import truncate as _truncate
from lora_lightning.cli.build import Run
from lora_lightning.commands.adapter_sources import AUTO, labels_of, open_source
from lora_lightning.commands.drift import drift_of_run, write_record
from lora_lightning.lora.errors import AdapterWarning, LoRAError
from lora_lightning.lora.formats.atomic_dir import refuse_occupied, write_bytes
from lora_lightning.lora.formats.peft.load import load_adapter
from lora_lightning.lora.inject import remove
from lora_lightning.lora.targets.patterns import regex_refusal
from lora_lightning.reports.figures import ENDINGS, refuse_missing, write_figures
from lora_lightning.reports.html import Block, Section, figure_sections, page, table_section
from lora_lightning.reports.table import Table
from lora_lightning.training.checkpoints.run_folder import run_of_checkpoint

RESULTS, PAGE, TRUNCATED = "analysis.json", "index.html", "truncated"
TITLE = "The rank that is used"
INTRO = """An adapted layer computes h = W0 x + s B A x. This page describes the update s B A by the measures of section
7 of the paper (Hu et al. 2021, arXiv 2106.09685): how many directions have its energy, ||s B A||_F squared; how much
larger it is than W0 in those directions (amplification); and which directions two adapters share (phi, from 0 to 1)."""


def analyze(
    adapters: Sequence[str],
    output_dir: Path,
    *,
    base_model: str = AUTO,
    truncate: float | None = None,
    layers: str | None = None,
    plots: bool = True,
    allow_other_base: bool = False,
    alphas: Mapping[str, float] | None = None,
    drift: str | None = None,
    drift_column: str = "text",
    drift_texts: int = MOST,
    scales: str | None = None,
) -> Analysis:
    """Open, measure, compare and truncate adapters, and write the results into the output folder.

    The arguments are the command's; they are checked before anything is opened.

    Raises:
        LoRAError: an argument is invalid; an adapter cannot be opened, does not belong to its base, or cannot be
            compared.
    """
    if not adapters:
        raise LoRAError("analyze needs an adapter's directory, a run or a checkpoint")
    if layers is not None and (reason := regex_refusal(layers)):
        raise LoRAError(f"layers: {layers!r} {reason}")
    if layers is not None and (len(adapters) == 1 or not plots):
        got = "got one adapter" if plots else "and plots is false"
        raise LoRAError(f"layers chooses the layers in the figures of two adapters, {got}: leave it out")
    if truncate is not None:
        check_share(truncate)
        if len(adapters) > 1:
            raise LoRAError(f"truncate takes one adapter, got {len(adapters)}: name the one to be cut")
        refuse_occupied(output_dir / TRUNCATED, WHAT, MARK)
    strengths = [] if scales is None else parse_scales(scales)
    moves = drift is not None or scales is not None
    if moves and len(adapters) > 1:
        raise LoRAError(f"drift takes one run, got {len(adapters)}: name the one to be measured")
    refuse_occupied(output_dir, "an analysis", RESULTS, f"{TRUNCATED}/{MARK}")
    if plots:
        refuse_missing()

    labels = labels_of(list(adapters))
    opened = zip(adapters, labels, strict=True)
    sources = [open_source(path, label, base_model, allow_other_base, alphas) for path, label in opened]
    result = Analysis(adapters=[measure_adapter(source.adapter, source.weights, _watch) for source in sources])
    for source, measures in zip(sources, result.adapters, strict=True):
        measures.notes.extend(source.notes)
    result.pairs = [compare_adapters(a.adapter, b.adapter, _watch) for a, b in combinations(sources, 2)]
    if result.pairs and not any(pair.layers for pair in result.pairs):
        raise LoRAError(f"{' and '.join(labels)} have no layer of one name and shape: they cannot be compared")
    source = sources[0]
    if moves:
        texts: dict[str, Any] = {"column": drift_column, "most": drift_texts, "notes": source.notes}
        result.drift = drift_of_run(source.run, drift, strengths, **texts)
    if truncate is not None:
        result.truncation = _truncate(source.adapter, truncate, output_dir / TRUNCATED)
        result.truncation.cost.update(_cost(source.run, output_dir / TRUNCATED))

    drawings = figures(result, layers) if plots else {}
    svgs = write_figures(output_dir, drawings, earlier=_earlier(output_dir))
    pictures = [f"{name}.{ending}" for name in drawings for ending in ENDINGS]
    values = {**asdict(result), "base_model": base_model, "pictures": pictures}
    write_bytes(output_dir / RESULTS, (json.dumps(finite(values)) + "\n").encode())
    sections = [table_section(table) for table in screens(result)] + figure_sections(drawings, svgs)
    long = tables.drift_tables(result.drift)[1] if result.drift is not None else []
    long += [*map(tables.pair_table, result.pairs), *map(tables.layer_table, result.adapters)]
    sections.append(Section("In full", [Block("table", table, fold=table.title) for table in long]))
    write_bytes(output_dir / PAGE, page(TITLE, INTRO, sections).encode())
    if result.drift is not None and source.run is not None:
        write_record(run_of_checkpoint(Path(source.adapter.source)), result.drift, svgs.get("drift"))
    return result


_watch = partial(track, description="analysing", transient=True)
"""Shows a progress bar over layers, which disappears at the end."""


def _cost(run: Run | None, truncated: Path) -> dict[str, Any]:
    """A run's validation metrics before and after the truncation, or why there are none.

    The run's model holds the truncated adapter afterwards.
    """
    if run is None or run.data is None:
        return {"not_measured": "only a run has a validation set to measure on: name the run's folder"}
    before, backbone = run.validate(), run.module.backbone
    remove(backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)  # shown when the adapter was opened
        load_adapter(backbone, truncated, allow_other_base=True)
    return {"validation": {"before": before, "after": run.validate()}}


def _earlier(folder: Path) -> Any:
    """File names of an earlier analysis's figures."""
    try:
        return json.loads((folder / RESULTS).read_text(encoding="utf-8"))["pictures"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def screens(result: Analysis) -> list[Table]:
    """The tables on the screen, which the page shows first."""
    rows = tables.drift_tables(result.drift)[0] if result.drift is not None else []
    rows += [tables.group_table(adapter) for adapter in result.adapters]
    rows += [tables.pair_table(pair, ("A", "B")) for pair in result.pairs]
    return rows + ([tables.truncation_table(result.truncation)] if result.truncation is not None else [])


def finite(value: Any) -> Any:
    """The value with nine digits, and null in place of NaN and infinities, which JSON has not."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else None
