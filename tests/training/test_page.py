"""The page of a run says what its log and its report say, and nothing that a reader could take for markup."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest

from lora_lightning.cli.main import LoRACLI
from lora_lightning.reports.curves import Axis, charts_of, read_metrics, short, thin_out
from lora_lightning.reports.html import write_page
from tests.chromium import looks, parsed


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A fit that logs every fourth step and validates twice an epoch."""
    runs = tmp_path_factory.mktemp("page")
    often = ["--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "4", "--trainer.val_check_interval", "4"]
    LoRACLI(args=["fit", "--config", tiny.config, "--runs_dir", str(runs), *often])
    return runs / "tiny" / "version_0"


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """The log's columns by step, read with the standard library alone."""
    found: dict[str, dict[int, float]] = {}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if text and name not in ("step", "epoch") and not name.startswith("params/"):
                    found.setdefault(name, {})[int(row["step"])] = float(text)
    return found


def text_of(node) -> str:
    return " ".join(" ".join(node.itertext()).split())


def lines_of(page) -> dict[str, list[tuple[float, float]]]:
    """By column, the steps and values that the drawn points stand for, from the axes that their picture names."""
    found = {}
    for svg in page.iter("svg"):
        (x0, x1, x2, x3), (y0, y1, y2, y3) = (map(float, svg.get(f"data-{a}").split()) for a in "xy")
        for group in (g for g in svg.iter("g") if g.get("data-series")):
            pairs = (pair.split() for pair in group.find("path").get("d").removeprefix("M").split(" L"))
            found[group.get("data-series")] = [
                (x0 + (float(x) - x2) / (x3 - x2) * (x1 - x0), y0 + (float(y) - y2) / (y3 - y2) * (y1 - y0))
                for x, y in pairs
            ]
    return found


def test_a_fit_leaves_a_page_whose_curves_are_its_log(trained):
    page, log = parsed(trained / "report.html"), logged(trained)
    lines = lines_of(page)
    assert {"train/loss", "val/loss", "val/accuracy", "lr", "grad_norm/A", "grad_norm/B", "grad_norm/all"} <= set(lines)
    assert {"throughput/samples_per_second", "throughput/tokens_per_second", "memory/process_peak_mib"} <= set(lines)
    assert lines.keys() == log.keys()
    for name, values in log.items():
        spread = max(values.values()) - min(values.values()) or abs(max(values.values()))
        assert [round(step) for step, _ in lines[name]] == sorted(values), name
        for (_, drawn), step in zip(lines[name], sorted(values), strict=True):
            assert drawn == pytest.approx(values[step], abs=0.01 * spread), name


def test_its_words_are_those_of_the_report(trained):
    report, text = json.loads((trained / "report.json").read_text()), text_of(parsed(trained / "report.html"))
    assert f"val accuracy {report['val_accuracy']:.1%}" in text
    assert f"{report['trainable']:,} train ({report['share']:.2%})" in text
    assert "BertForSequenceClassification" in text
    assert "W0 unchanged" in text
    assert f"W0 after the fit {report['w0_after']}: unchanged" in text
    assert f"best val/accuracy at step {report['best_step']}" in text
    assert report["best_step"] in logged(trained)["val/accuracy"]
    assert logged(trained)["val/accuracy"][report["best_step"]] == pytest.approx(report["val_accuracy"])
    for row in report["adapted"]:
        assert f"{row['module']} {row['count']} {row['kind']}" in text
    assert sum(int(row["parameters"].replace(",", "")) for row in report["adapted"]) == report["trainable"]
    assert (trained / "config.yaml").read_text().splitlines()[5] in "".join(
        parsed(trained / "report.html").itertext()
    ), "the config is on the page as it is"


def test_in_a_browser_it_has_the_same_numbers_and_fits_both_windows(trained, tmp_path):
    """A desk's and a phone's: nothing sticks out, and what is written in the pictures can be read."""
    shutil.copy(trained / "report.html", tmp_path / "report.html")
    drawn, report = lines_of(parsed(trained / "report.html")), json.loads((trained / "report.json").read_text())
    for width, seen in zip((1280, 390), looks(tmp_path / "report.html", [1280, 390]), strict=True):
        assert seen["window"] == width
        assert seen["wide"] <= width, "the page itself does not scroll sideways"
        assert seen["out"] == []
        assert seen["small"] >= 9
        assert f"{report['val_accuracy']:.1%}" in seen["text"]
        assert "unchanged" in seen["text"]
        points = dict(seen["points"])
        assert points.keys() == drawn.keys()
        for name, values in logged(trained).items():
            tips = [tip for _, _, tip in points[name]]
            assert tips == [f"{name} {values[step]:.6g} at step {step}" for step in sorted(values)]


def test_it_asks_for_nothing_from_elsewhere(trained):
    page = parsed(trained / "report.html")
    assert not list(page.iter("script"))
    for node in page.iter():
        assert not {"href", "srcset", "onload", "style"} & set(node.keys()), node.tag
        assert node.get("src", "data:").startswith("data:")
    style = page.find("head/style").text
    assert "url(" not in style
    assert "@import" not in style


def test_text_of_others_is_text(tmp_path):
    nasty = '<script>alert("1")</script> & \x00\x1b[1m "quoted" </td>'
    report = {"backbone": nasty, "adapted": [{"module": nasty, "count": "1"}], "checkpoint": nasty, "total": 2}
    report |= {"trainable": 1, "monitor": nasty, "best_step": 3, "w0_before": nasty, "w0_after": nasty}
    folder = tmp_path / 'a<b>&"c' / "version_0"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "config.yaml").write_text(f"name: {nasty}\n")
    sample = {"step": 3, "prompt": nasty, "reference": nasty, "before": nasty, "after": nasty}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    with (folder / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["step", f"val/{nasty}"], [0, 1.5], [1, 2.5]])
    page = parsed(write_page(folder))
    assert not list(page.iter("script"))
    assert text_of(page.find("head/title")) == 'a<b>&"c version_0'
    shown = nasty.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    assert text_of(page).count(" ".join(shown.split())) >= 10
    assert page.find(".//td[@class='text']").text == shown


def test_a_log_is_read_whatever_a_broken_off_fit_left(tmp_path):
    file = tmp_path / "metrics.csv"
    lines = [
        "step,train/loss_step,val/loss",
        "0,1.0,",
        "1,nan,",
        "1,,0.5",
        "2,inf,",
        "2,,0.4",
        "2,,0.3",
        "x,9,9",
        "3,1e",
    ]
    file.write_text("\n".join(lines))
    train, val = read_metrics(file)
    assert (train.points, train.left_out) == (((0, 1.0),), 2)
    assert val.points == ((1, 0.5), (2, 0.3)), "the later of two counts"
    assert read_metrics(tmp_path / "none.csv") == []
    (tmp_path / "empty.csv").write_text("")
    assert read_metrics(tmp_path / "empty.csv") == []
    page = parsed(write_page(tmp_path))
    assert "2 not finite" in text_of(page)


def test_a_run_without_a_log_or_a_report_has_a_page_too(tmp_path):
    assert "Nothing was logged" in text_of(parsed(write_page(tmp_path)))


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [1e-320, 2e-320], [-1e299, 1e299], [1e30, 1e-30], [5, -5, 0]])
def test_any_finite_numbers_can_be_drawn(tmp_path, values):
    rows = "\n".join(f"{step},{value!r}" for step, value in enumerate(values))
    (tmp_path / "metrics.csv").write_text(f"step,val/loss\n{rows}\n")
    page = parsed(write_page(tmp_path))
    (line,) = lines_of(page).values()
    spread = max(values) - min(values) or max(map(abs, values)) or 1
    assert [v for _, v in line] == pytest.approx(values, abs=max(0.01 * spread, 1e-12))
    assert len(list(page.find(".//svg/g").iter("text"))) >= 3, "there is something to read the axes by"


def test_long_lines_keep_their_peaks(tmp_path):
    points = tuple((i, math.sin(i / 300)) for i in range(50_000))
    points = (*points[:7777], (7777, 9.0), *points[7778:])
    drawn = thin_out(points)
    assert len(drawn) < 400
    assert (7777, 9.0) in drawn
    assert {points[0], points[-1]} <= set(drawn) <= set(points)
    assert drawn == sorted(drawn)


def test_charts_put_together_what_belongs_together(tmp_path):
    names = (
        "train/loss_step,train/loss,val/loss,val_mismatched/loss,lr,lr/B,val/f1,mine/own,val/loss_before,params/share"
    )
    (tmp_path / "metrics.csv").write_text(
        f"step,epoch,{names}\n" + "\n".join(f"{i},0,{','.join('1' * 10)}" for i in (0, 1))
    )
    charts = {c.title: [s.name for s in c.series] for c in charts_of(read_metrics(tmp_path / "metrics.csv"))}
    assert next(iter(charts)) == "loss"
    assert sorted(charts["loss"]) == sorted(names.split(",")[:4])
    assert charts["learning rate"] == ["lr", "lr/B"]
    assert list(charts)[-1] == "learning rate"
    assert set(charts) == {"loss", "learning rate", "f1", "mine/own"}


def test_ticks_are_round_and_inside():
    for low, high in ((0, 1), (0.31, 0.74), (-5, 123456), (1e-9, 3e-9), (99, 101)):
        ticks = Axis(low, high, 0, 100).ticks(5)
        assert 2 <= len(ticks) <= 7
        assert all(low - 1e-9 * abs(low) <= tick <= high * (1 + 1e-9) for tick in ticks)
        assert len({short(tick) for tick in ticks}) == len(ticks)
