"""A classifier's page counts what its metrics count, and shows its most confident mistakes."""

import json

import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from lora_lightning.cli.main import LoRACLI
from lora_lightning.reports.classes import MISTAKES, ClassCounts, class_table, confused_pairs, confusions
from lora_lightning.reports.html import write_page
from tests.chromium import parsed


def batches(classes, rows=40, count=4):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        labels = torch.randint(classes, (rows,), generator=generator)
        yield torch.randn(rows, classes, generator=generator) + 2 * torch.eye(classes)[labels], labels


@pytest.mark.parametrize("classes", [2, 5])
def test_counts_and_figures_per_class_are_those_of_torchmetrics(classes):
    counts = ClassCounts(classes)
    for logits, labels in batches(classes):
        counts.add(logits, labels, {})
    logits, labels = (torch.cat(parts) for parts in zip(*batches(classes), strict=True))
    assert torch.equal(counts.counts, multiclass_confusion_matrix(logits, labels, classes))
    *rows, mean = class_table(counts.to_dict()).rows
    for column, metric in enumerate((multiclass_precision, multiclass_recall, multiclass_f1_score), start=1):
        each = metric(logits, labels, classes, average="none")
        assert [float(row[column]) for row in rows] == pytest.approx(each.tolist(), abs=5e-4)
        assert float(mean[column]) == pytest.approx(float(metric(logits, labels, classes, average="macro")), abs=5e-4)
    assert [int(row[4]) for row in rows] == labels.bincount(minlength=classes).tolist()


def test_parts_of_several_processes_are_the_whole():
    whole, parts = ClassCounts(3), [ClassCounts(3), ClassCounts(3)]
    for i, (logits, labels) in enumerate(batches(3)):
        whole.add(logits, labels, {})
        parts[i % 2].add(logits, labels, {})
    joined = parts[0].join(parts[1:])
    assert torch.equal(joined.counts, whole.counts)
    assert joined.mistakes == whole.mistakes


def test_the_most_confident_mistakes_are_kept_in_their_order():
    counts, wrong = ClassCounts(3), []
    for logits, labels in batches(3):
        counts.add(logits, labels, {})
        confidence, predicted = logits.softmax(-1).max(-1)
        wrong += confidence[predicted != labels].tolist()
    assert [m["confidence"] for m in counts.mistakes] == pytest.approx(sorted(wrong, reverse=True)[:MISTAKES])
    assert all(m["true"] != m["predicted"] for m in counts.mistakes)


def test_labels_that_are_no_class_count_for_nothing():
    counts = ClassCounts(2)
    counts.add(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([-100, 0]), {})
    assert counts.counts.tolist() == [[1, 0], [0, 0]]
    assert counts.mistakes == []


def test_pictures_are_shown_small_and_within_the_page():
    counts = ClassCounts(2)
    batch = {"pixel_values": torch.randn(1, 3, 200, 100)}
    counts.add(torch.tensor([[0.0, 3.0]]), torch.tensor([0]), batch)
    assert counts.mistakes[0]["picture"].startswith("data:image/png;base64,")
    assert len(counts.mistakes[0]["picture"]) < 40_000


def test_many_classes_are_shown_by_the_pairs_that_are_mixed_up_most():
    found = {"labels": ["a", "b", "c"], "counts": [[5, 2, 0], [7, 1, 0], [0, 0, 3]], "mistakes": []}
    assert confused_pairs(found).rows == [["b", "a", "7"], ["a", "b", "2"]]
    assert [(name, [n for n, _, _ in row]) for name, row in confusions(found)] == [
        ("a", [5, 2, 0]),
        ("b", [7, 1, 0]),
        ("c", [0, 0, 3]),
    ]


def test_a_classifiers_page_has_matrix_figures_and_mistakes_with_their_texts(tiny, tmp_path):
    LoRACLI(args=["fit", "--config", tiny.config, "--runs_dir", str(tmp_path), "--trainer.max_epochs", "1"])
    run = tmp_path / "tiny" / "version_0"
    LoRACLI(args=["test", "--config", tiny.config, "--runs_dir", str(tmp_path), "--ckpt_path", str(run)])
    report = json.loads((run / "report.json").read_text())
    assert report["metric_titles"] == {"f1": "F1 (macro)"}
    text = " ".join("".join(parsed(run / "report.html").itertext()).split())
    for stage, words in (("val", "validation"), ("test", "test")):
        found = json.loads((run / f"classes_{stage}.json").read_text())
        counts = torch.tensor(found["counts"])
        assert float(counts.diagonal().sum() / counts.sum()) == pytest.approx(report[f"{stage}_accuracy"], abs=1e-6)
        assert float(class_table(found).rows[-1][3]) == pytest.approx(report[f"{stage}_f1"], abs=6e-4)
        assert f"Classes, {words}" in text
        for mistake in found["mistakes"]:
            assert mistake["text"] in text
    assert "F1 (macro)" in text
    assert all(label in text for label in found["labels"])


def test_what_the_data_say_of_themselves_is_on_the_page(tmp_path):
    data = {
        "rows": {"train": 1234, "test": 5},
        "labels": {"train": {"<b>": 3}},
        "cut": {"test": {"texts cut": 0.25}},
        "warnings": ["w!"],
    }
    (tmp_path / "report.json").write_text(json.dumps({"data": data}))
    text = " ".join("".join(parsed(write_page(tmp_path)).itertext()).split())
    for words in ("1,234", "labeled <b>", "25.0%", "w!"):
        assert words in text
