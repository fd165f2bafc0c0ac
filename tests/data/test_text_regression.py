"""Numbers and pairs of texts become batches; a head of one output follows from the data."""

import datasets
import pytest
import torch

from lora_lightning import huggingface
from lora_lightning.data.classification import TextRegressionData
from lora_lightning.data.io.splits import SplitConfig
from tests.data.files import ready, write

ROWS = [{"one": f"the film is {'fine' if i % 2 else 'dull'}", "two": "the end", "score": i / 4} for i in range(30)]
PAIRS = {"text_column": "one", "text_pair_column": "two", "number_column": "score"}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_numbers(tmp_path, bert, suffix):
    data = ready(TextRegressionData, write(tmp_path / f"set{suffix}", ROWS), bert, **PAIRS)
    batch = next(iter(data.train_dataloader()))
    assert batch["labels"].dtype == torch.float32
    assert batch["token_type_ids"].max() == 1
    scores = [label for split in ("train", "validation", "test") for label in data.encoded_rows(split)["labels"]]
    assert sorted(scores) == [row["score"] for row in ROWS]


def test_whole_numbers_are_numbers_too(tmp_path, bert):
    rows = [{**row, "score": i} for i, row in enumerate(ROWS)]
    data = ready(TextRegressionData, write(tmp_path / "set.jsonl", rows), bert, **PAIRS)
    assert next(iter(data.val_dataloader()))["labels"].dtype == torch.float32


def test_the_head_has_one_output_named_as_the_column(tmp_path, bert):
    data = TextRegressionData(str(write(tmp_path / "set.csv", ROWS)), str(bert), **PAIRS)
    model = huggingface(str(bert), label_names=data.label_names)
    assert (model.config.num_labels, model.config.id2label, data.num_classes) == (1, {0: "score"}, 1)


def test_hidden_scores_are_for_prediction(tmp_path, bert):
    hidden = [{**row, "score": -1.0} for row in ROWS[:5]]
    tables = {"train": ROWS, "validation": ROWS[:6], "test": hidden}
    datasets.DatasetDict({n: datasets.Dataset.from_list(rows) for n, rows in tables.items()}).save_to_disk(
        tmp_path / "stsb"
    )
    data = ready(TextRegressionData, tmp_path / "stsb", bert, split=SplitConfig(test=0.0), **PAIRS)
    assert {name: len(table) for name, table in data.tables.items()} == {"train": 30, "validation": 6, "predict": 5}
    assert "labels" not in next(iter(data.predict_dataloader()))
