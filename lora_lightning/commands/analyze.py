"""`lora-lightning analyze`: tables, figures and numbers of adapters, and on request a smaller adapter."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.progress import Progress

from lora_lightning.analysis import tables
from lora_lightning.analysis.measures import measure_adapter
from lora_lightning.analysis.plots import Analysis, figures
from lora_lightning.analysis.similarity import compare_adapters
from lora_lightning.analysis.truncation import MARK, WHAT, Truncation, check_share, truncate
from lora_lightning.cli.build import Run
from lora_lightning.commands.adapter_sources import AUTO, Source, SourceOptions, labels_of, open_source
from lora_lightning.commands.drift import DriftRequest, drift_of_run, write_record
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


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to analyze, checked before anything is opened."""

    adapters: Sequence[str]
    output_dir: Path
    wanted: SourceOptions = field(default_factory=SourceOptions)
    truncate: float | None = None
    layers: str | None = None
    plots: bool = True
    drift: DriftRequest | None = None

    def __post_init__(self) -> None:
        if not self.adapters:
            raise LoRAError("analyze needs an adapter's directory, a run or a checkpoint")
        if self.layers is not None and (reason := regex_refusal(self.layers)):
            raise LoRAError(f"layers: {self.layers!r} {reason}")
        if self.layers is not None and (len(self.adapters) == 1 or not self.plots):
            got = "got one adapter" if self.plots else "and plots is false"
            raise LoRAError(f"layers chooses the layers in the figures of two adapters, {got}: leave it out")
        if self.truncate is not None:
            check_share(self.truncate)
            if len(self.adapters) > 1:
                raise LoRAError(f"truncate takes one adapter, got {len(self.adapters)}: name the one to be cut")
            refuse_occupied(self.output_dir / TRUNCATED, WHAT, MARK)
        if self.drift is not None and len(self.adapters) > 1:
            raise LoRAError(f"drift takes one run, got {len(self.adapters)}: name the one to be measured")
        refuse_occupied(self.output_dir, "an analysis", RESULTS, f"{TRUNCATED}/{MARK}")
        if self.plots:
            refuse_missing()


def analyze(request: Request) -> Analysis:
    """Open, measure, compare and truncate adapters, and write the results into the output folder.

    Raises:
        LoRAError: an adapter cannot be opened, does not belong to its base, or cannot be compared.
    """
    labels = labels_of(list(request.adapters))
    sources = [open_source(p, label, request.wanted) for p, label in zip(request.adapters, labels, strict=True)]
    result = Analysis(adapters=[])
    with _progress(sources) as advance:
        for source in sources:
            measures = measure_adapter(source.adapter, source.weights, advance)
            measures.notes.extend(source.notes)
            result.adapters.append(measures)
        for first, second in combinations(sources, 2):
            result.pairs.append(compare_adapters(first.adapter, second.adapter, advance))
    if result.pairs and not any(pair.layers for pair in result.pairs):
        raise LoRAError(f"{' and '.join(labels)} have no layer of one name and shape: they cannot be compared")
    if request.drift is not None:
        result.drift = drift_of_run(sources[0].run, request.drift, sources[0].notes)
    if request.truncate is not None:
        result.truncation = _truncate_adapter(sources[0], request)
    svgs = write(result, request)
    if result.drift is not None and sources[0].run is not None:
        write_record(run_of_checkpoint(Path(sources[0].adapter.source)), result.drift, svgs.get("drift"))
    return result


def _truncate_adapter(source: Source, request: Request) -> Truncation:
    assert request.truncate is not None
    directory = request.output_dir / TRUNCATED
    truncation = truncate(source.adapter, request.truncate, directory)
    truncation.cost.update(_cost(source.run, directory))
    return truncation


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


def write(result: Analysis, request: Request) -> dict[str, bytes]:
    """Write the numbers, the page and the figures; returns the figures as SVG by name."""
    folder = request.output_dir
    drawings = figures(result, request.layers) if request.plots else {}
    svgs = write_figures(folder, drawings, earlier=_earlier(folder))
    pictures = [f"{name}.{ending}" for name in drawings for ending in ENDINGS]
    values = {**asdict(result), "base_model": request.wanted.base_model, "pictures": pictures}
    write_bytes(folder / RESULTS, (json.dumps(finite(values)) + "\n").encode())
    sections = [table_section(table) for table in screens(result)] + figure_sections(drawings, svgs)
    long = tables.drift_tables(result.drift)[1] if result.drift is not None else []
    long += [*map(tables.pair_table, result.pairs), *map(tables.layer_table, result.adapters)]
    sections.append(Section("In full", [Block("table", table, fold=table.title) for table in long]))
    write_bytes(folder / PAGE, page(TITLE, INTRO, sections).encode())
    return svgs


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


@contextmanager
def _progress(sources: list[Source]) -> Iterator[Any]:
    """A progress bar over layers, which disappears at the end."""
    layers = [len(source.adapter.factors) for source in sources]
    total = sum(layers) + sum(layers[i] for i, _ in combinations(range(len(layers)), 2))
    with Progress(transient=True) as bar:
        task = bar.add_task("analysing", total=total)
        yield lambda count: bar.advance(task, count)


__all__ = ["AUTO", "Analysis", "DriftRequest", "Request", "SourceOptions", "analyze", "screens"]
