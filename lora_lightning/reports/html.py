"""Pages without network and scripts, light or dark like the reader's browser, from one template.

`write_page` makes the `report.html` of a run from the files in the run's folder; `page` makes any other page.
"""

from __future__ import annotations

import base64
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2

from lora_lightning.lora.formats.atomic_dir import human_size, write_bytes
from lora_lightning.reports.classes import MOST_SHOWN, class_table, confused_pairs, confusions
from lora_lightning.reports.console import BEFORE, data_table, report_rows, short_count
from lora_lightning.reports.curves import charts_of, numbers_table, read_metrics, short
from lora_lightning.reports.figures import Drawing
from lora_lightning.reports.table import Table

PAGE, REPORT, CONFIG = "report.html", "report.json", "config.yaml"
METRICS, SAMPLES, CLASSES = "metrics.csv", "samples.jsonl", "classes_{stage}.json"
DRIFT, DRIFT_FIGURE = "drift.json", "drift.svg"
"""Files of a run's folder: the page, and its sources."""
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that neither HTML nor XML allows in text."""


@dataclass(frozen=True)
class Block:
    """A piece of a page."""

    kind: str
    """The macro of the template that shows it: `table`, `charts`, `picture`, `matrix`, `mistakes`, `code` or `text`."""
    content: Any
    """A `Table`, the result of `charts_of` or `confusions`, a text, or what `_picture` and `_classes` make."""
    fold: str = ""
    """The title under which the block is folded."""


@dataclass(frozen=True)
class Section:
    """A part of a page with its heading."""

    title: str
    blocks: Sequence[Block]
    beside: bool = False
    """Whether the blocks are side by side where there is room."""


def page(
    title: str,
    lead: str,
    sections: Sequence[Section],
    *,
    version: str = "",
    badges: Iterable[tuple[str, str]] = (),
    figures: Iterable[tuple[str, str, str]] = (),
    footer: str = "",
) -> str:
    """One page as text.

    Args:
        title: of the page.
        lead: the first sentence.
        sections: the content.
        version: shown after the title.
        badges: framed words, each with the CSS class of its color: `good`, `bad` or `soft`.
        figures: key numbers, each with its name, its value, and a note.
        footer: the last line.
    """
    return template().render(
        title=title, lead=lead, sections=sections, version=version, badges=[*badges], figures=[*figures], footer=footer
    )


@functools.cache
def template() -> jinja2.Template:
    """The template, which escapes all text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value,
    )
    return environment.get_template("template.html.j2")


def figure_sections(drawings: Mapping[str, Drawing], svgs: Mapping[str, bytes]) -> list[Section]:
    """A section for each of matplotlib's figures."""
    return [Section(one.title, [_picture(svgs[name], one.caption)]) for name, one in drawings.items()]


def _picture(svg: bytes, caption: str) -> Block:
    return Block("picture", (f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}", caption))


def table_section(table: Table) -> Section:
    """A section with a table under its title."""
    return Section(table.title, [Block("table", table)])


# ---- the page of a run


def write_page(folder: Path) -> Path:
    """Write the page of the run in `folder` from the files that are there; returns the page's file."""
    file, report = folder / PAGE, _json(folder / REPORT)
    numbered = folder.name.startswith("version_")
    name, version = (folder.parent.name, folder.name) if numbered else (folder.name, "")
    text = page(
        name,
        _sentence(report),
        [*_sections(folder, report)],
        version=version,
        badges=_badges(report),
        figures=_cards(report),
        footer=f"Made by lora_lightning from the files in {folder}.",
    )
    write_bytes(file, text.encode())
    return file


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _json(file: Path) -> dict[str, Any]:
    return json.loads(_text(file) or "{}")  # type: ignore[no-any-return]


def _sentence(v: Mapping[str, Any]) -> str:
    """A sentence with the backbone, the method, and the share that trains."""
    text = str(v.get("backbone") or "")
    if "total" in v:
        text += f"{', ' if text else ''}{short_count(v['total'])} parameters, of which {v['trainable']:,} train"
        text += f" ({v['trainable'] / max(v['total'], 1):.2%})"
    if isinstance(lora := v.get("lora"), dict):
        ways = [("use_dora", "DoRA"), ("use_rslora", "rsLoRA")]
        method = " and ".join(name for key, name in ways if lora.get(key)) or "LoRA"
        text += f": {method} with r = {lora.get('r')}, alpha = {lora.get('alpha'):g}"
    text = f"{text}." if text else ""
    return f"{text} Its sweep dropped it {v['dropped']}." if v.get("dropped") else text


def _badges(v: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The results of the checks, each in a few words, with the CSS class of its color."""
    if v.get("dropped"):
        yield "dropped", "bad"
    if "w0_unchanged" in v:
        yield ("W0 unchanged", "good") if v["w0_unchanged"] else ("W0 moved", "bad")
    if "export_max_rel_diff" in v and "export_tolerance" in v:
        good = v["export_max_rel_diff"] <= v["export_tolerance"]
        text = f"export {'equals' if good else 'differs from'} the adapted model: {v['export_max_rel_diff']:.1e}"
        yield text, "good" if good else "bad"
    if v.get("best_step") is not None and v.get("monitor"):
        yield f"best {v['monitor']} at step {v['best_step']}", "soft"


def _cards(v: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The key numbers: name, value, and a note. First the metric that chose the best checkpoint, else the loss."""
    monitored = str(v.get("monitor") or "val/loss").partition("/")[2]
    for stage, probe in (("val", v.get("probe_accuracy")), ("test", v.get("probe_test_accuracy"))):
        metric = monitored if f"{stage}_{monitored}" in v else "loss"
        value, before = (v.get(f"{stage}_{metric}{end}") for end in ("", BEFORE))
        if isinstance(value, int | float):
            beside = f"{probe:.1%} by a probe" if metric == "accuracy" and probe is not None else ""
            name = (v.get("metric_titles") or {}).get(metric, metric.replace("_", " "))
            shown = f"{value:.1%}" if metric == "accuracy" else short(value)
            yield f"{stage} {name}", shown, beside if before is None else f"{short(before)} before"
    if "trainable" in v:
        yield "trainable", short_count(v["trainable"]), f"{v['trainable'] / max(v['total'], 1):.2%} of all"
    if size := v.get("adapter_bytes") or v.get("adapter_tensor_bytes"):
        full = v.get("full_checkpoint_bytes")
        yield "adapter", human_size(size), f"beside {human_size(full)}" if full else ""
    if "train_seconds" in v:
        yield "time of fit", _duration(v["train_seconds"]), f"{v.get('steps', 0):,} steps, {v.get('precision')}"
    if v.get("tokens_per_second"):
        yield "tokens per second", short(v["tokens_per_second"]), f"{short(v['samples_per_second'])} samples"
    elif v.get("samples_per_second"):
        yield "samples per second", short(v["samples_per_second"]), ""
    if v.get("peak_mib"):
        yield "memory, at most", human_size(int(v["peak_mib"] * 2**20)), str(v.get("device", ""))


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _sections(folder: Path, v: Mapping[str, Any]) -> Iterator[Section]:
    """What there is to show: data, curves, classes, drift, the injection table, answers, figures and proofs, config."""
    if summary := v.get("data"):
        yield Section("Data", [Block("table", data_table(summary))])
    if "test_data" not in v or (folder / METRICS).is_file():  # a test of other data has no log
        series = read_metrics(folder / METRICS)
        charts = charts_of(series, v.get("best_step"), v.get("metric_titles"))
        numbers = Block("table", numbers_table(series), fold="The numbers behind the curves")
        nothing = Block("text", f"Nothing was logged to {METRICS}.")
        yield Section("Curves", [Block("charts", charts), numbers] if charts else [nothing])
    validated, tested = (_json(folder / CLASSES.format(stage=stage)) for stage in ("val", "test"))
    yield from _classes(validated, "validation", fold=bool(tested))
    yield from _classes(tested, "test")
    yield from _drift(folder)
    if rows := v.get("adapted"):
        header = list(rows[0])
        text = [i for i, name in enumerate(header) if name in ("module", "kind")]
        table = Table(header=header, rows=[[str(x) for x in row.values()] for row in rows], text=text, code=True)
        yield Section("What trains", [Block("table", table)])
    samples = [json.loads(line) for line in _text(folder / SAMPLES).splitlines() if line.strip()]
    if newest := [s for s in samples if s["step"] == samples[-1]["step"]]:
        columns = ("prompt", "reference", "before", "after")
        answers = [[str(s.get(name, "")) for name in columns] for s in newest]
        table = Table(header=columns, rows=answers, text=range(4), prose=True)
        yield Section(f"Answers after {newest[0]['step']} steps", [Block("table", table)])
    facts = [row for row in report_rows(v) if row[0] != "W0 before, after"]  # here in full
    if v.get("w0_before"):
        verdict = "unchanged" if v.get("w0_unchanged") else "moved"
        facts += [("W0 before the fit", str(v["w0_before"])), ("W0 after the fit", f"{v['w0_after']}: {verdict}")]
    if facts:
        yield Section("Figures and proofs", [Block("table", Table(rows=facts))])
    if config := _text(folder / CONFIG):
        yield Section("Config", [Block("code", config, fold=f"{CONFIG}, resolved")])


def _classes(confusion: Mapping[str, Any], title_of_set: str, *, fold: bool = False) -> Iterator[Section]:
    """The class counts of a classifier on one set, and its mistakes, which `fold` folds."""
    if not confusion:
        return
    labels, many = confusion["labels"], len(confusion["labels"]) > MOST_SHOWN
    figures = Block("table", class_table(confusion), fold="Figures of every class" if many else "")
    counts = Block("table", confused_pairs(confusion)) if many else Block("matrix", confusions(confusion))
    yield Section(f"Classes, {title_of_set}", [figures, counts], beside=not many)
    if confusion["mistakes"]:
        named = [{**m, "true": labels[m["true"]], "predicted": labels[m["predicted"]]} for m in confusion["mistakes"]]
        folded = f"The {len(named)} mistakes of which the model was surest" if fold else ""
        yield Section(f"The most confident mistakes, {title_of_set}", [Block("mistakes", named, fold=folded)])


def _drift(folder: Path) -> list[Section]:
    """The drift of the model, and its strengths, where `analyze --drift` has measured them."""
    tables = [Table(**table) for table in _json(folder / DRIFT).get("tables", [])]
    sections = [table_section(table) for table in tables if table.note or not table.header]
    folded = [Block("table", table, fold=table.title) for table in tables if table.header and not table.note]
    if figure := _text(folder / DRIFT_FIGURE):
        folded.insert(0, _picture(figure.encode(), "The validation metric over the drift, by strength of the update."))
    if sections:
        sections[-1] = replace(sections[-1], blocks=[*sections[-1].blocks, *folded])
    return sections
