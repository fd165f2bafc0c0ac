"""Pages without network and scripts, light or dark like the reader's browser, from one template.

`write_page` makes the `report.html` of a run from the files in the run's folder; `page` makes any other page.
"""

from __future__ import annotations

import base64
import functools
import json
import re
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True, kw_only=True)
class Block:
    """A piece of a page: one of these fields, which the template shows."""

    table: Table | None = None
    facts: Table | None = None
    """A table of facts, over the whole width."""
    prose: Table | None = None
    """A table of texts, whose lines stay as they are."""
    charts: Sequence[Mapping[str, Any]] = ()
    """The result of `charts_of`."""
    figure: str = ""
    """The `data:` URL of a picture, with `text` as its caption."""
    matrix: Sequence[Any] = ()
    """The result of `confusions`."""
    cards: Sequence[Mapping[str, Any]] = ()
    """Mistakes: each with its classes, the model's confidence, and a text or a picture."""
    code: str = ""
    text: str = ""
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
    badges: Sequence[tuple[str, str]] = (),
    figures: Sequence[tuple[str, str, str]] = (),
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
        title=title,
        lead=lead,
        sections=sections,
        version=version,
        badges=badges,
        figures=figures,
        footer=footer,
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
        finalize=_replace_forbidden,
    )
    return environment.get_template("template.html.j2")


def _replace_forbidden(value: Any) -> Any:
    """Text without forbidden characters."""
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value


def figure_sections(drawings: Mapping[str, Drawing], svgs: Mapping[str, bytes]) -> list[Section]:
    """A section for each of matplotlib's figures."""
    return [
        Section(
            drawing.title,
            [Block(figure=f"data:image/svg+xml;base64,{base64.b64encode(svgs[name]).decode()}", text=drawing.caption)],
        )
        for name, drawing in drawings.items()
    ]


def table_section(table: Table) -> Section:
    """A section with a table under its title."""
    return Section(table.title, [Block(table=table) if table.header else Block(facts=table)])


# ---- the page of a run


def write_page(folder: Path) -> Path:
    """Write the page of the run in `folder`; returns the file."""
    file = folder / PAGE
    write_bytes(file, run_page(folder).encode())
    return file


def run_page(folder: Path) -> str:
    """The page as text, from the existing files of the run's folder."""
    v = json.loads(_text(folder / REPORT) or "{}")
    numbered = folder.name.startswith("version_")
    name, version = (folder.parent.name, folder.name) if numbered else (folder.name, "")
    sections = [*_data(v), *_curves(v, folder / METRICS)]
    classes = {stage: json.loads(_text(folder / CLASSES.format(stage=stage)) or "{}") for stage in ("val", "test")}
    sections += _classes(classes["val"], "validation", fold=bool(classes["test"]))
    sections += _classes(classes["test"], "test")
    sections += [
        *_drift(folder),
        *_adapted_section(v),
        *_answers(_lines(folder / SAMPLES)),
        *_facts(v),
        *_config(_text(folder / CONFIG)),
    ]
    return page(
        name,
        sentence(v),
        sections,
        version=version,
        badges=badges(v),
        figures=cards(v),
        footer=f"Made by lora_lightning from the files in {folder}.",
    )


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _text(file).splitlines() if line.strip()]


def sentence(v: Mapping[str, Any]) -> str:
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


def badges(v: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The results of the checks, each in a few words, with the CSS class of its color."""
    marks = [("dropped", "bad")] if v.get("dropped") else []
    if "w0_unchanged" in v:
        marks.append(("W0 unchanged", "good") if v["w0_unchanged"] else ("W0 moved", "bad"))
    if "export_max_rel_diff" in v and "export_tolerance" in v:
        good = v["export_max_rel_diff"] <= v["export_tolerance"]
        text = f"export {'equals' if good else 'differs from'} the adapted model: {v['export_max_rel_diff']:.1e}"
        marks.append((text, "good" if good else "bad"))
    if v.get("best_step") is not None and v.get("monitor"):
        marks.append((f"best {v['monitor']} at step {v['best_step']}", "soft"))
    return marks


def cards(v: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The key numbers: name, value, and a note."""
    numbers = [card for stage in ("val", "test") for card in _monitored_card(v, stage)]
    if "trainable" in v:
        numbers.append(("trainable", short_count(v["trainable"]), f"{v['trainable'] / max(v['total'], 1):.2%} of all"))
    if size := v.get("adapter_bytes") or v.get("adapter_tensor_bytes"):
        beside = v.get("full_checkpoint_bytes")
        numbers.append(("adapter", human_size(size), f"beside {human_size(beside)}" if beside else ""))
    if "train_seconds" in v:
        steps = f"{v.get('steps', 0):,} steps, {v.get('precision')}"
        numbers.append(("time of fit", duration(v["train_seconds"]), steps))
    if v.get("tokens_per_second"):
        numbers.append(
            ("tokens per second", short(v["tokens_per_second"]), f"{short(v['samples_per_second'])} samples")
        )
    elif v.get("samples_per_second"):
        numbers.append(("samples per second", short(v["samples_per_second"]), ""))
    if v.get("peak_mib"):
        numbers.append(("memory, at most", human_size(int(v["peak_mib"] * 2**20)), str(v.get("device", ""))))
    return numbers


def _monitored_card(v: Mapping[str, Any], stage: str) -> list[tuple[str, str, str]]:
    """The metric that chose the best checkpoint, else the loss."""
    monitored = str(v.get("monitor") or "val/loss").partition("/")[2]
    metric = next((name for name in (monitored, "loss") if f"{stage}_{name}" in v), None)
    value = v.get(f"{stage}_{metric}")
    if metric is None or not isinstance(value, int | float):
        return []
    before = v.get(f"{stage}_{metric}{BEFORE}")
    probe = v.get({"val": "probe_accuracy", "test": "probe_test_accuracy"}[stage]) if metric == "accuracy" else None
    reference = (
        f"{short(before)} before" if before is not None else f"{probe:.1%} by a probe" if probe is not None else ""
    )
    name = (v.get("metric_titles") or {}).get(metric, metric.replace("_", " "))
    return [(f"{stage} {name}", f"{value:.1%}" if metric == "accuracy" else short(value), reference)]


def duration(seconds: float) -> str:
    """Seconds in a readable unit."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _data(v: Mapping[str, Any]) -> list[Section]:
    """The data's summary, where the DataModule had one."""
    summary = v.get("data")
    return [Section("Data", [Block(table=data_table(summary))])] if summary else []


def _curves(v: Mapping[str, Any], file: Path) -> list[Section]:
    """All charts, or why there are none; a test of other data has no log."""
    if "test_data" in v and not file.is_file():
        return []
    series = read_metrics(file)
    charts = charts_of(series, v.get("best_step"), v.get("metric_titles"))
    if not charts:
        return [Section("Curves", [Block(text=f"Nothing was logged to {METRICS}.")])]
    numbers = Block(table=numbers_table(series), fold="The numbers behind the curves")
    return [Section("Curves", [Block(charts=charts), numbers])]


def _classes(confusion: Mapping[str, Any], title_of_set: str, *, fold: bool = False) -> list[Section]:
    """The class counts of a classifier on one set, and its mistakes, which `fold` folds."""
    if not confusion:
        return []
    many = len(confusion["labels"]) > MOST_SHOWN
    blocks = [Block(table=class_table(confusion), fold="Figures of every class" if many else "")]
    blocks += [Block(table=confused_pairs(confusion)) if many else Block(matrix=confusions(confusion))]
    sections = [Section(f"Classes, {title_of_set}", blocks, beside=not many)]
    if confusion["mistakes"]:
        named = [
            {**m, "true": confusion["labels"][m["true"]], "predicted": confusion["labels"][m["predicted"]]}
            for m in confusion["mistakes"]
        ]
        title = f"The most confident mistakes, {title_of_set}"
        folded = f"The {len(named)} mistakes of which the model was surest" if fold else ""
        sections.append(Section(title, [Block(cards=named, fold=folded)]))
    return sections


def _drift(folder: Path) -> list[Section]:
    """The drift of the model, and its strengths, where `analyze --drift` has measured them."""
    tables = [Table(**table) for table in json.loads(_text(folder / DRIFT) or "{}").get("tables", [])]
    sections = [table_section(table) for table in tables if table.note or not table.header]
    folded = [Block(table=table, fold=table.title) for table in tables if table.header and not table.note]
    if figure := _text(folder / DRIFT_FIGURE):
        address = f"data:image/svg+xml;base64,{base64.b64encode(figure.encode()).decode()}"
        caption = "The validation metric over the drift, by strength of the update."
        folded.insert(0, Block(figure=address, text=caption))
    if sections:
        sections[-1] = replace(sections[-1], blocks=[*sections[-1].blocks, *folded])
    return sections


def _adapted_section(v: Mapping[str, Any]) -> list[Section]:
    """The grouped injection table."""
    rows = v.get("adapted")
    if not rows:
        return []
    header = list(rows[0])
    text = [i for i, name in enumerate(header) if name in ("module", "kind")]
    table = Table(header=header, rows=[[str(x) for x in row.values()] for row in rows], text=text, code=True)
    return [Section("What trains", [Block(table=table)])]


def _answers(samples: Sequence[Mapping[str, Any]]) -> list[Section]:
    """The newest answers of a language model, beside the plain model's."""
    newest = [s for s in samples if s["step"] == samples[-1]["step"]]
    if not newest:
        return []
    columns = ("prompt", "reference", "before", "after")
    table = Table(header=columns, rows=[[str(s.get(name, "")) for name in columns] for s in newest], text=range(4))
    return [Section(f"Answers after {newest[0]['step']} steps", [Block(prose=table)])]


def _facts(v: Mapping[str, Any]) -> list[Section]:
    """The closing table of the run, as on the screen, with the fingerprints in full."""
    rows = [row for row in report_rows(v) if row[0] != "W0 before, after"]
    if v.get("w0_before"):
        verdict = "unchanged" if v.get("w0_unchanged") else "moved"
        rows += [("W0 before the fit", str(v["w0_before"])), ("W0 after the fit", f"{v['w0_after']}: {verdict}")]
    return [Section("Figures and proofs", [Block(facts=Table(rows=rows))])] if rows else []


def _config(text: str) -> list[Section]:
    """The whole resolved config, folded."""
    return [Section("Config", [Block(code=text, fold=f"{CONFIG}, resolved")])] if text else []


__all__ = ["Block", "Section", "figure_sections", "page", "run_page", "table_section", "write_page"]
