"""The three forms of several labels give the same targets; names and numbers are taken as they come."""

import datasets
import pytest
import torch

from lora_lightning import LoRAError
from lora_lightning.data.classification import MultiLabelTextData
from lora_lightning.data.io.splits import SplitConfig
from tests.data.files import ready, write

LABELS = [["sport"], ["money", "sport"], [], ["tech", "money"]]
ROWS = [{"text": f"the film {i}", "labels": LABELS[i % 4]} for i in range(40)]
EXPECTED = [[0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1]]


def targets(data):
    return [[int(flag) for flag in row] for row in data.encoded_rows("train")["labels"][:4]]


def of(path, bert, **kwargs):
    return ready(MultiLabelTextData, path, bert, split=SplitConfig(validation=0.0, test=0.0), **kwargs)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_lists_of_labels(tmp_path, bert, suffix):
    data = of(write(tmp_path / f"set{suffix}", ROWS), bert)
    assert data.label_names == ["money", "sport", "tech"]
    assert targets(data) == EXPECTED
    batch = next(iter(data.train_dataloader()))
    assert batch["labels"].shape == (4, 3)
    assert batch["labels"].dtype == torch.float32


@pytest.mark.parametrize("separator", [";", "|"])
def test_labels_in_one_text(tmp_path, bert, separator):
    rows = [{**row, "labels": f" {separator}".join(row["labels"])} for row in ROWS]
    data = of(write(tmp_path / "set.csv", rows), bert, separator=separator)
    assert data.label_names == ["money", "sport", "tech"]
    assert targets(data) == EXPECTED


def test_a_column_for_each_label(tmp_path, bert):
    rows = [{"text": r["text"], **{n: int(n in r["labels"]) for n in ("money", "sport", "tech")}} for r in ROWS]
    data = of(write(tmp_path / "set.csv", rows), bert, label_columns=["money", "sport", "tech"])
    assert data.label_names == ["money", "sport", "tech"]
    assert targets(data) == EXPECTED


@pytest.mark.parametrize("names", [None, ["money", "sport", "tech"]])
def test_numbers_of_labels_take_the_names_that_are_given(tmp_path, bert, names):
    rows = [{**row, "labels": [["money", "sport", "tech"].index(n) for n in row["labels"]]} for row in ROWS]
    data = of(write(tmp_path / "set.jsonl", rows), bert, label_names=names)
    assert data.label_names == (names or ["0", "1", "2"])
    assert targets(data) == EXPECTED


def test_class_labels_keep_their_names_and_numbers(tmp_path, bert):
    named = datasets.Sequence(datasets.ClassLabel(names=["money", "sport", "tech"]))
    features = datasets.Features(text=datasets.Value("string"), labels=named)
    datasets.Dataset.from_list(ROWS, features=features).save_to_disk(tmp_path / "saved")
    data = of(tmp_path / "saved", bert)
    assert data.label_names == ["money", "sport", "tech"]
    assert targets(data) == EXPECTED


def test_label_columns_name_the_labels(tmp_path, bert):
    with pytest.raises(LoRAError, match=r"label_columns name the labels.*leave label_names out"):
        MultiLabelTextData("unused", str(bert), label_columns=["a", "b"], label_names=["A", "B"])
    with pytest.raises(LoRAError, match="separator must be what stands between"):
        MultiLabelTextData("unused", str(bert), separator="")
