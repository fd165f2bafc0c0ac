"""What the data would tell is told before the first step, each thing that is wrong with its cure."""

import csv
import io
import time

import datasets
import pytest
from rich.console import Console

from lora_lightning import DatasetData, TextClassificationData
from lora_lightning.data.io.splits import SplitConfig
from lora_lightning.data.io.summary import summarize
from lora_lightning.lora.errors import LoRAError
from lora_lightning.reports.console import show_data

ROWS = [
    ("the film is lovely and warm", "Billing"),
    ("the film is dull", "billing "),
    ("a story of two friends", "Billing"),
    ("   ", "billing "),
    ("a \0 story", "Billing"),
    ("its end is grim " * 10, "billing "),
    ("bright and clever", "rare"),
    ("a warm story", "Billing"),
]


def write(file, rows, header=("text", "label")):
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([header, *rows])
    return str(file)


@pytest.fixture
def told(tiny, tmp_path):
    """Train has what is wrong; validation has a row of it, and test none."""
    path = {
        "train": write(tmp_path / "train.csv", ROWS),
        "validation": write(tmp_path / "validation.csv", [*ROWS[:1], ("two friends", "Billing")]),
        "test": write(tmp_path / "test.csv", [("the end", "Billing")]),
    }
    data = TextClassificationData(path, tiny.bert, max_length=20)
    data.setup()
    return data.data_summary


def test_rows_and_labels_are_counted_by_split(told):
    assert told["rows"] == {"train": 8, "validation": 2, "test": 1}
    assert told["labels"]["train"] == {"Billing": 4, "billing ": 3, "rare": 1}
    assert told["labels"]["test"] == {"Billing": 1, "billing ": 0, "rare": 0}
    assert told["cut"] == {"train": pytest.approx(1 / 8), "validation": 0.0, "test": 0.0}
    assert told["in_two_splits"] == {"validation in train": 1}


@pytest.mark.parametrize(
    ("wrong", "cure"),
    [
        ("1 of 2 rows of validation stand in train too", "remove them"),
        ("'Billing', 'billing ' differ by case or blanks only", "write them alike"),
        ("the label rare (1)", "add rows"),
        ("column 'text': 1 texts are blank", "remove those rows"),
        ("column 'text': 1 texts hold NUL bytes", "UTF-8"),
        ("12% of the texts in train are cut at 20 tokens", "max_length"),
    ],
)
def test_each_thing_that_is_wrong_is_one_line_with_its_cure(told, wrong, cure):
    (line,) = [line for line in told["warnings"] if wrong in line]
    assert cure in line.partition(wrong)[2]
    assert "\n" not in line


def test_what_is_right_is_not_warned_of(tiny):
    data = TextClassificationData(tiny.reviews, tiny.bert, split=SplitConfig(group_by="film"))
    data.setup()
    assert not [line for line in data.data_summary["warnings"] if "stand in" not in line]


def test_rows_that_a_split_has_torn_apart_are_told_with_the_option_that_keeps_them_together(tiny, tmp_path):
    rows = [(f"story {i // 2}", str(i % 2)) for i in range(40)]
    data = TextClassificationData(write(tmp_path / "all.csv", rows), tiny.bert)
    data.setup()
    assert any("split.group_by" in line for line in data.data_summary["warnings"])


def test_a_column_that_stands_twice_is_an_error_where_it_is_used_else_a_warning(tiny, tmp_path):
    rows = [(text, label, 1) for text, label in ROWS]
    used = write(tmp_path / "used.csv", rows, ("text", "label", "label"))
    with pytest.raises(LoRAError, match=r"used.csv.*column 'label' twice: rename one"):
        _ = TextClassificationData(used, tiny.bert).tables
    beside = write(tmp_path / "beside.csv", [(*row, 2) for row in rows], ("text", "label", "note", "note"))
    data = TextClassificationData(beside, tiny.bert)
    data.setup()
    assert [line for line in data.data_summary["warnings"] if "note twice" in line]


def test_the_box_says_it_all(told):
    screen = Console(file=io.StringIO(), width=160)
    show_data(told, screen)
    shown = screen.file.getvalue()
    for text in ("train 8", "validation 2", "Billing 4", "12.5% of train", *told["warnings"]):
        assert text in shown


def test_a_torch_dataset_tells_how_many_examples_it_has():
    assert DatasetData(train=[1, 2, 3], validation=[1]).data_summary == {"rows": {"train": 3, "validation": 1}}


def test_many_rows_take_a_moment(tiny, tmp_path):
    texts = [f"a story of {i} friends" for i in range(300_000)]
    table = datasets.Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(len(texts))]})
    data = TextClassificationData("none", tiny.bert)
    data._tables = {"train": table, "test": table.select(range(0, 300_000, 3))}
    began = time.perf_counter()
    assert summarize(data)["in_two_splits"] == {"test in train": 100_000}
    assert time.perf_counter() - began < 5
