"""The page of a run says what its log and its report say, and nothing that a reader could take for markup."""

import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from lora_lightning.reports.classes import MISTAKES, ClassCounts, class_table, confused_pairs, confusions
from lora_lightning.reports.curves import read_metrics, thin_out
from lora_lightning.reports.html import write_page
from lora_lightning.training.callbacks.run_report import RunReport
from tests.chromium import looks, parsed


def text_of(node) -> str:
    return " ".join(" ".join(node.itertext()).split())


@pytest.fixture(scope="module")
def ran(tracked):
    """The run, its page as the fit left it, and of its log what the page draws."""
    page = parsed(tracked.folder / "fitted.html")
    log = {name: values for name, values in tracked.log.items() if not name.startswith(("params/", "export/"))}
    return SimpleNamespace(folder=tracked.folder, page=page, report=tracked.report, text=text_of(page), log=log)


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


def test_a_fit_leaves_a_page_whose_curves_are_its_log(ran):
    lines = lines_of(ran.page)
    assert {"train/loss", "val/accuracy", "lr", "grad_norm/all", "throughput/tokens_per_second"} <= set(lines)
    assert lines.keys() == ran.log.keys()
    for name, values in ran.log.items():
        spread = max(values.values()) - min(values.values()) or abs(max(values.values()))
        assert [round(step) for step, _ in lines[name]] == sorted(values), name
        for (_, drawn), step in zip(lines[name], sorted(values), strict=True):
            assert drawn == pytest.approx(values[step], abs=0.01 * spread), name


def test_its_words_are_those_of_the_report(ran):
    report, text = ran.report, ran.text
    assert f"val accuracy {report['val_accuracy']:.1%}" in text
    assert f"{report['trainable']:,} train ({report['share']:.2%})" in text
    assert f"W0 after the fit {report['w0_after']}: unchanged" in text
    assert f"best val/accuracy at step {report['best_step']}" in text
    assert ran.log["val/accuracy"][report["best_step"]] == pytest.approx(report["val_accuracy"])
    for row in report["adapted"]:
        assert f"{row['module']} {row['count']} {row['kind']}" in text
    assert sum(int(row["parameters"].replace(",", "")) for row in report["adapted"]) == report["trainable"] == 3906
    config = (ran.folder / "config.yaml").read_text().splitlines()
    assert config[5] in "".join(ran.page.itertext()), "the config is on the page as it is"
    assert (ran.folder.parent / "report.json").read_text() == (ran.folder / "report.json").read_text()


def test_in_a_browser_it_has_the_same_numbers_and_fits_both_windows(ran):
    """A desk's and a phone's: nothing sticks out, and what is written in the pictures can be read."""
    drawn = lines_of(ran.page)
    for width, seen in zip((1280, 390), looks(ran.folder / "fitted.html", [1280, 390]), strict=True):
        assert seen["window"] == width
        assert seen["wide"] <= width, "the page itself does not scroll sideways"
        assert seen["out"] == []
        assert seen["small"] >= 9
        assert f"{ran.report['val_accuracy']:.1%}" in seen["text"]
        points = dict(seen["points"])
        assert points.keys() == drawn.keys()
        for name, values in ran.log.items():
            tips = [tip for _, _, tip in points[name]]
            assert tips == [f"{name} {values[step]:.6g} at step {step}" for step in sorted(values)]


def test_it_asks_for_nothing_from_elsewhere(ran):
    assert not list(ran.page.iter("script"))
    for node in ran.page.iter():
        assert not {"href", "srcset", "onload", "style"} & set(node.keys()), node.tag
        assert node.get("src", "data:").startswith("data:")
    assert all(word not in ran.page.find("head/style").text for word in ("url(", "@import"))


def test_text_of_others_is_text(tmp_path):
    nasty = '<script>alert("1")</script> & \x00\x1b[1m "quoted" </td>'
    report = {"backbone": nasty, "adapted": [{"module": nasty, "count": "1"}], "checkpoint": nasty, "total": 2}
    report |= {"trainable": 1, "monitor": nasty, "best_step": 3, "w0_before": nasty, "w0_after": nasty}
    sample = {"step": 3, "prompt": nasty, "reference": nasty, "before": nasty, "after": nasty}
    folder = tmp_path / 'a<b>&"c' / "version_0"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "config.yaml").write_text(f"name: {nasty}\n")
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    with (folder / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["step", f"val/{nasty}"], [0, 1.5], [1, 2.5]])
    page = parsed(write_page(folder))
    assert not list(page.iter("script"))
    assert text_of(page.find("head/title")) == 'a<b>&"c version_0'
    shown = nasty.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    assert text_of(page).count(" ".join(shown.split())) >= 10
    assert page.find(".//td[@class='text']").text == shown


def test_what_the_data_say_of_themselves_is_on_the_page(tmp_path):
    data = {"rows": {"train": 1234, "test": 5}, "labels": {"train": {"<b>": 3}}, "warnings": ["w!"]}
    (tmp_path / "report.json").write_text(json.dumps({"data": {**data, "cut": {"test": {"texts cut": 0.25}}}}))
    text = text_of(parsed(write_page(tmp_path)))
    assert "Nothing was logged" in text, "a run without a log has a page too"
    for words in ("1,234", "labeled <b>", "25.0%", "w!"):
        assert words in text


def test_a_log_is_read_whatever_a_broken_off_fit_left(tmp_path):
    file = tmp_path / "metrics.csv"
    torn = "0,1.0,|1,nan,|1,,0.5|2,inf,|2,,0.4|2,,0.3|x,9,9|3,1e"
    file.write_text("\n".join(["step,train/loss_step,val/loss", *torn.split("|")]))
    train, val = read_metrics(file)
    assert (train.points, train.left_out) == (((0, 1.0),), 2)
    assert val.points == ((1, 0.5), (2, 0.3)), "the later of two counts"
    assert "2 not finite" in text_of(parsed(write_page(tmp_path)))
    file.write_text("")
    assert read_metrics(file) == read_metrics(tmp_path / "none.csv") == []


def test_long_lines_keep_their_peaks():
    points = tuple((i, math.sin(i / 300)) for i in range(50_000))
    points = (*points[:7777], (7777, 9.0), *points[7778:])
    drawn = thin_out(points)
    assert len(drawn) < 400
    assert {points[0], (7777, 9.0), points[-1]} <= set(drawn) <= set(points)
    assert drawn == sorted(drawn)


# A classifier's page counts what its metrics count, and shows its most confident mistakes.


def test_a_classifiers_page_has_matrix_figures_and_mistakes_with_their_texts(ran):
    report, text = json.loads((ran.folder / "report.json").read_text()), text_of(parsed(ran.folder / "report.html"))
    assert "F1 (macro)" in text
    for stage, words in (("val", "validation"), ("test", "test")):
        found = json.loads((ran.folder / f"classes_{stage}.json").read_text())
        counts = torch.tensor(found["counts"])
        assert float(counts.diagonal().sum() / counts.sum()) == pytest.approx(report[f"{stage}_accuracy"], abs=1e-6)
        assert float(class_table(found).rows[-1][3]) == pytest.approx(report[f"{stage}_f1"], abs=6e-4)
        shown = [f"Classes, {words}", *found["labels"], *(mistake["text"] for mistake in found["mistakes"])]
        assert all(part in text for part in shown)


def batches(classes, rows=40, count=4):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        labels = torch.randint(classes, (rows,), generator=generator)
        yield torch.randn(rows, classes, generator=generator) + 2 * torch.eye(classes)[labels], labels


@pytest.mark.parametrize("classes", [2, 5])
def test_counts_and_figures_per_class_are_those_of_torchmetrics_also_in_parts(classes):
    counts, parts, wrong = ClassCounts(classes), [ClassCounts(classes), ClassCounts(classes)], []
    for i, (logits, labels) in enumerate(batches(classes)):
        counts.add(logits, labels, {})
        parts[i % 2].add(logits, labels, {})
        confidence, predicted = logits.softmax(-1).max(-1)
        wrong += confidence[predicted != labels].tolist()
    joined = parts[0].join(parts[1:])
    assert torch.equal(joined.counts, counts.counts)
    assert joined.mistakes == counts.mistakes
    assert [m["confidence"] for m in counts.mistakes] == pytest.approx(sorted(wrong, reverse=True)[:MISTAKES])
    assert all(m["true"] != m["predicted"] for m in counts.mistakes)
    logits, labels = (torch.cat(parts) for parts in zip(*batches(classes), strict=True))
    assert torch.equal(counts.counts, multiclass_confusion_matrix(logits, labels, classes))
    *rows, mean = class_table(counts.to_dict()).rows
    for column, metric in enumerate((multiclass_precision, multiclass_recall, multiclass_f1_score), start=1):
        each = metric(logits, labels, classes, average="none")
        assert [float(row[column]) for row in rows] == pytest.approx(each.tolist(), abs=5e-4)
        assert float(mean[column]) == pytest.approx(float(metric(logits, labels, classes, average="macro")), abs=5e-4)
    assert [int(row[4]) for row in rows] == labels.bincount(minlength=classes).tolist()


def test_labels_that_are_no_class_count_for_nothing_and_pictures_are_shown_small():
    counts = ClassCounts(2)
    counts.add(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([-100, 0]), {})
    assert (counts.counts.tolist(), counts.mistakes) == ([[1, 0], [0, 0]], [])
    counts.add(torch.tensor([[0.0, 3.0]]), torch.tensor([0]), {"pixel_values": torch.randn(1, 3, 200, 100)})
    assert counts.mistakes[0]["picture"].startswith("data:image/png;base64,")
    assert len(counts.mistakes[0]["picture"]) < 40_000


def test_the_classes_counted_are_those_of_the_checkpoint_that_is_kept(monkeypatch):
    report, written, kept = RunReport(), [], SimpleNamespace(monitor="val/loss", mode="min")
    report._classes = ClassCounts(2)
    monkeypatch.setattr(report, "_write_classes", lambda trainer, *_: written.append(trainer.global_step))
    module = SimpleNamespace(task=SimpleNamespace(monitor="val/accuracy", monitor_mode="max"))
    same = {"checkpoint_callback": kept, "state": SimpleNamespace(fn="fit"), "sanity_checking": False}
    for step, best, loss, accuracy in ((1, None, 0.5, 0.6), (2, 0.5, 0.4, 0.5), (3, 0.4, 0.6, 0.7)):
        kept.best_model_score, same["callback_metrics"] = best, {"val/loss": loss, "val/accuracy": accuracy}
        report.on_validation_end(SimpleNamespace(global_step=step, fast_dev_run=True, **same), module)
    assert written == [1, 2]


def test_many_classes_are_shown_by_the_pairs_that_are_mixed_up_most():
    found = {"labels": ["a", "b", "c"], "counts": [[5, 2, 0], [7, 1, 0], [0, 0, 3]], "mistakes": []}
    assert confused_pairs(found).rows == [["b", "a", "7"], ["a", "b", "2"]]
    shown = [(name, [n for n, _, _ in row]) for name, row in confusions(found)]
    assert shown == [("a", [5, 2, 0]), ("b", [7, 1, 0]), ("c", [0, 0, 3])]
