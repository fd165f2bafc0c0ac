"""The parts of the page, each from what `report.json` and the run's other files say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lora_lightning.lora.formats.atomic_dir import human_size
from lora_lightning.reports.about import short_count
from lora_lightning.reports.console import BEFORE, report_rows
from lora_lightning.reports.page.chart import figure, short
from lora_lightning.reports.page.markup import Markup, joined, tag
from lora_lightning.reports.page.series import Series, charts_of

Facts = dict[str, Any]


def head(v: Facts, name: str, version: str) -> Markup:
    """What was adapted, in a sentence, and what was proven."""
    title = tag("h1", name, *([tag("span", f" / {version}")] if version else []))
    return tag("header", title, tag("p", sentence(v)), tag("ul", *badges(v), class_="badges"))


def sentence(v: Facts) -> str:
    """Backbone, method, and the share that trains."""
    told = str(v.get("backbone") or "")
    if "total" in v:
        told += f"{', ' if told else ''}{short_count(v['total'])} parameters, of which {v['trainable']:,} train"
        told += f" ({v['trainable'] / max(v['total'], 1):.2%})"
    if isinstance(lora := v.get("lora"), dict):
        ways = [("use_dora", "DoRA"), ("use_rslora", "rsLoRA")]
        method = " and ".join(name for key, name in ways if lora.get(key)) or "LoRA"
        told += f": {method} with r = {lora.get('r')}, alpha = {lora.get('alpha'):g}"
    return f"{told}." if told else ""


def badges(v: Facts) -> Iterable[Markup]:
    """The proofs in a word each."""
    if "w0_unchanged" in v:
        good = bool(v["w0_unchanged"])
        yield tag("li", "W0 unchanged" if good else "W0 moved", class_="good" if good else "bad")
    if "export_max_rel_diff" in v and "export_tolerance" in v:
        good = v["export_max_rel_diff"] <= v["export_tolerance"]
        told = f"export {'equals' if good else 'differs from'} the adapted model: {v['export_max_rel_diff']:.1e}"
        yield tag("li", told, class_="good" if good else "bad")
    if v.get("best_step") is not None and v.get("monitor"):
        yield tag("li", f"best {v['monitor']} at step {v['best_step']}", class_="soft")


def cards(v: Facts) -> Markup:
    """The figures that are asked for first."""
    found = [_figure_card(v, "val"), _figure_card(v, "test")]
    if "trainable" in v:
        found.append(("trainable", short_count(v["trainable"]), f"{v['trainable'] / max(v['total'], 1):.2%} of all"))
    if size := v.get("adapter_bytes") or v.get("adapter_tensor_bytes"):
        beside = v.get("full_checkpoint_bytes")
        found.append(("adapter", human_size(size), f"beside {human_size(beside)}" if beside else ""))
    if "train_seconds" in v:
        found.append(
            ("time of fit", duration(v["train_seconds"]), f"{v.get('steps', 0):,} steps, {v.get('precision')}")
        )
    if v.get("tokens_per_second"):
        found.append(("tokens per second", short(v["tokens_per_second"]), f"{short(v['samples_per_second'])} samples"))
    elif v.get("samples_per_second"):
        found.append(("samples per second", short(v["samples_per_second"]), ""))
    if v.get("peak_mib"):
        found.append(("memory, at most", human_size(int(v["peak_mib"] * 2**20)), str(v.get("device", ""))))
    return tag("div", *(_card(*one) for one in found if one), class_="cards")


def _card(name: str, figure: str, beside: str) -> Markup:
    more = [tag("dd", beside)] if beside else []
    return tag("dl", tag("dt", name), tag("dd", figure), *more, class_="card")


def _figure_card(v: Facts, stage: str) -> tuple[str, str, str] | None:
    """The figure that chose the best checkpoint, else the loss."""
    monitored = str(v.get("monitor") or "val/loss").partition("/")[2]
    key = next((f"{stage}_{name}" for name in (monitored, "loss") if f"{stage}_{name}" in v), None)
    if key is None or not isinstance(v[key], int | float):
        return None
    name = key.removeprefix(f"{stage}_").replace("_", " ")
    before = v.get(f"{key}{BEFORE}")
    probe = v.get({"val": "probe_accuracy", "test": "probe_test_accuracy"}[stage]) if name == "accuracy" else None
    told = f"{short(before)} before" if before is not None else f"{probe:.1%} by a probe" if probe is not None else ""
    return f"{stage} {name}", f"{v[key]:.1%}" if name == "accuracy" else short(v[key]), told


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def curves(v: Facts, series: list[Series]) -> Markup:
    """All charts, or a word on why there are none."""
    charts = charts_of(series)
    if not charts:
        return section("Curves", tag("p", "Nothing was logged to metrics.csv.", class_="soft"))
    return section(
        "Curves", tag("div", *(figure(chart, v.get("best_step")) for chart in charts), class_="charts"), numbers(series)
    )


def numbers(series: list[Series]) -> Markup:
    """What the charts show, as a table."""
    rows = []
    for one in (s for s in series if s.points):
        least, most = min(one.points, key=lambda p: p[1]), max(one.points, key=lambda p: p[1])
        cells = [f"{one.points[0][1]:.6g}", f"{one.points[-1][1]:.6g}"]
        cells += [f"{value:.6g} at {step}" for step, value in (least, most)]
        rows.append([one.name, str(len(one.points)), *cells])
    header = ["column of metrics.csv", "points", "first", "last", "least, at step", "greatest, at step"]
    return tag("details", tag("summary", "The numbers behind the curves"), table(header, rows, numbers_from=1))


def adapted(v: Facts) -> Markup:
    """The grouped injection table."""
    rows = v.get("adapted")
    if not rows:
        return Markup()
    header = list(rows[0])
    first = next((i for i, name in enumerate(header) if name == "r"), len(header))
    return section("What trains", table(header, [[str(x) for x in row.values()] for row in rows], numbers_from=first))


def facts(v: Facts) -> Markup:
    """The closing table of the run, as on the screen, with the fingerprints in full."""
    told = [row for row in report_rows(v) if row[0] != "W0 before, after"]
    if v.get("w0_before"):
        verdict = "unchanged" if v.get("w0_unchanged") else "moved"
        told += [("W0 before the fit", str(v["w0_before"])), ("W0 after the fit", f"{v['w0_after']}: {verdict}")]
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", text)) for name, text in told]
    body = tag("table", tag("tbody", *rows), class_="facts")
    return section("Figures and proofs", tag("div", body, class_="wide")) if rows else Markup()


def answers(samples: Sequence[dict[str, Any]]) -> Markup:
    """The newest answers of a language model, beside those of the plain one."""
    newest = [s for s in samples if s["step"] == samples[-1]["step"]]
    if not newest:
        return Markup()
    columns = ("prompt", "reference", "before", "after")
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in columns)))
    rows = [tag("tr", *(tag("td", str(s.get(name, "")), class_="text") for name in columns)) for s in newest]
    said = tag("div", tag("table", head, tag("tbody", *rows)), class_="wide")
    return section(f"Answers after {newest[0]['step']} steps", said)


def config(text: str) -> Markup:
    """The whole resolved config, folded."""
    if not text:
        return Markup()
    return section("Config", tag("details", tag("summary", "config.yaml, resolved"), tag("pre", text)))


def section(title: str, *content: str) -> Markup:
    """A part with its heading."""
    return tag("section", tag("h2", title), *content)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int) -> Markup:
    """A table that scrolls by itself where it is too wide; columns from this one on are numbers."""

    def kind(i: int) -> str:
        return "name" if i == 0 else "number" if i >= numbers_from else ""

    top = tag("tr", *(tag("th", x, scope="col", class_=kind(i).replace("name", "")) for i, x in enumerate(header)))
    body = [tag("tr", *(tag("td", x, class_=kind(i)) for i, x in enumerate(row))) for row in rows]
    return tag("div", joined(tag("table", tag("thead", top), tag("tbody", *body))), class_="wide")
