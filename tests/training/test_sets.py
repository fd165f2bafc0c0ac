"""Several sets to validate, test and predict on: each is counted apart, the first chooses the checkpoint."""

import csv
import json

import datasets
import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, LoRAError, LoRAModule, SequenceClassification, TextClassificationData
from lora_lightning.cli.main import LoRACLI
from lora_lightning.data import stage_of
from tests.data.files import write
from tests.tiny import make_bert
from tests.training.test_module import trainer_of

ROWS = [{"text": f"the film is {'fine' if i % 2 else 'dull'}", "label": ["bad", "good"][i % 2]} for i in range(24)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(make_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture
def mnli(tmp_path):
    """Files by split, as MNLI has them: two sets of each kind that are not of one size, and no plain one."""
    parts = {"train": ROWS, "validation_matched": ROWS[:9], "dev_mismatched": ROWS[9:14]}
    parts |= {"test_matched": ROWS[:6], "test_mismatched": ROWS[6:7]}
    (tmp_path / "mnli").mkdir()
    for name, rows in parts.items():
        write(tmp_path / "mnli" / f"{name}.jsonl", rows)
    return tmp_path / "mnli"


def test_sets_go_by_their_names_and_the_first_stands_for_its_kind(mnli, bert):
    data = TextClassificationData(str(mnli), bert)
    sizes = {name: len(table) for name, table in data.tables.items()}
    assert sizes == {"train": 24, "validation": 9, "validation_mismatched": 5, "test": 6, "test_mismatched": 1}
    assert data.has_validation
    assert data.sets("validation") == ["validation", "validation_mismatched"]
    assert [stage_of(data, "val", i) for i in (0, 1)] == ["val", "val_mismatched"]
    assert data.place("validation") == "validation_matched.jsonl, the validation_matched set"


def test_a_plain_set_is_the_first_wherever_it_stands(mnli, bert):
    write(mnli / "validation.jsonl", ROWS[:3])
    data = TextClassificationData(str(mnli), bert)
    assert data.sets("validation") == ["validation", "validation_matched", "validation_mismatched"]
    assert len(data.tables["validation"]) == 3


def test_one_further_set_to_train_on_is_none_of_ours(mnli, bert):
    paths = {"train": str(mnli / "train.jsonl"), "train_more": str(mnli / "train.jsonl")}
    with pytest.raises(LoRAError, match=r"unknown split 'train_more'.*validation_NAME"):
        _ = TextClassificationData(paths, bert).tables


def test_hidden_labels_of_several_sets_are_for_prediction(tmp_path, bert):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))
    rows = [{**row, "label": i % 2} for i, row in enumerate(ROWS)]
    hidden = [{**row, "label": -1} for row in rows]
    tables = {"train": rows, "validation_matched": rows[:6], "test_matched": hidden[:5], "test_mismatched": hidden[:4]}
    named = {name: datasets.Dataset.from_list(part, features=features) for name, part in tables.items()}
    datasets.DatasetDict(named).save_to_disk(tmp_path / "mnli")
    data = TextClassificationData(str(tmp_path / "mnli"), bert)
    assert {n: len(t) for n, t in data.tables.items() if n.startswith("predict")} == {
        "predict": 5,
        "predict_mismatched": 4,
    }


def config(mnli, bert):
    return f"""
name: mnli
trainer: {{max_epochs: 1, accelerator: cpu, enable_progress_bar: false}}
model:
  backbone: {{class_path: lora_lightning.huggingface, init_args: {{pretrained_model_name_or_path: {bert}}}}}
  lora: {{r: 2, modules_to_save: [classifier]}}
  task: {{class_path: lora_lightning.SequenceClassification}}
data:
  class_path: lora_lightning.TextClassificationData
  init_args: {{path: {mnli}, tokenizer: {bert}, batch_size: 4}}
"""


def test_a_run_reports_each_set_and_predicts_each(mnli, bert, tmp_path):
    (tmp_path / "run.yaml").write_text(config(mnli, bert))
    cli = LoRACLI(args=["fit", "--config", "run.yaml"])
    folder = tmp_path / "runs" / "mnli"
    LoRACLI(args=["test", "--ckpt_path", str(folder)])
    LoRACLI(args=["predict", "--ckpt_path", str(folder)])
    report = json.loads((folder / "report.json").read_text())
    right, files = {}, {"test": "predictions", "test_mismatched": "predictions_mismatched"}
    for stage, file in files.items():
        said = [json.loads(line) for line in (folder / f"version_0/predict/{file}.jsonl").open()]
        labels = [row["label"] for row in (ROWS[:6] if stage == "test" else ROWS[6:7])]
        right[stage] = sum(row["label"] == label for row, label in zip(said, labels, strict=True)) / len(labels)
        assert report[f"{stage}_accuracy"] == pytest.approx(right[stage])
    assert {"val_accuracy", "val_mismatched_accuracy", "val_mismatched_loss"} <= set(report)
    with next(folder.glob("*/metrics.csv")).open() as file:
        assert {"val/accuracy", "val_mismatched/accuracy"} <= set(next(csv.reader(file)))
    assert cli.trainer.checkpoint_callback.monitor == "val/accuracy"
    assert not [key for key in cli.model.state_dict() if "task" in key]


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 2)

    def forward(self, x):
        return self.body(x)


def test_lists_of_loaders_are_counted_by_number_and_anew_each_time(tmp_path):
    rows = [{"x": torch.randn(2), "labels": torch.tensor(i % 2)} for i in range(20)]
    loaders = [torch.utils.data.DataLoader(part, batch_size=4) for part in (rows, rows[:11], rows[11:])]
    module = LoRAModule(Sum(), SequenceClassification(2), LoRAConfig(r=1, target_modules=["body"]))
    trainer = trainer_of(tmp_path, max_epochs=3, enable_checkpointing=False, num_sanity_val_steps=0)
    trainer.fit(module, loaders[0], loaders[1:])
    shown = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for stage, part in (("val", rows[:11]), ("val_1", rows[11:])):
        logits = module(torch.stack([row["x"] for row in part])).detach()
        labels = torch.stack([row["labels"] for row in part])
        assert shown[f"{stage}/accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
        assert shown[f"{stage}/loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    again = trainer.validate(module, loaders[1:], verbose=False)
    assert again[0]["val/accuracy"] == pytest.approx(shown["val/accuracy"])
    assert again[1]["val_1/accuracy"] == pytest.approx(shown["val_1/accuracy"])
