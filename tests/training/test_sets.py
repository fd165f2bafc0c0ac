"""Several sets to validate, test and predict on: each is counted apart, the first chooses the checkpoint."""

import json

import datasets
import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, LoRAError, LoRAModule, SequenceClassification, TextClassificationData
from lora_lightning.cli.main import LoRACLI
from lora_lightning.data import stage_of
from tests.data.files import write
from tests.training.conftest import by_step
from tests.training.small import trainer_of

LABELS = ["bad", "good"]
ROWS = [
    {"text": f"the film is {'fine' if i % 2 else 'dull'}", "label": LABELS[i % 2], "film": i % 4} for i in range(24)
]


@pytest.fixture
def mnli(tmp_path):
    """Files by split, as MNLI has them: two sets of each kind that are not of one size, and no plain one."""
    parts = {"train": ROWS, "validation_matched": ROWS[:9], "dev_mismatched": ROWS[9:14]}
    parts |= {"test_matched": ROWS[:6], "test_mismatched": ROWS[6:7]}
    (tmp_path / "mnli").mkdir()
    for name, rows in parts.items():
        write(tmp_path / "mnli" / f"{name}.jsonl", rows)
    return tmp_path / "mnli"


def sizes(path, tiny, kind=""):
    return {n: len(t) for n, t in TextClassificationData(str(path), tiny.bert).tables.items() if n.startswith(kind)}


def test_sets_go_by_their_names_and_the_first_stands_for_its_kind(mnli, tiny):
    data = TextClassificationData(str(mnli), tiny.bert)
    assert data.has_validation
    assert data.sets("validation") == ["validation", "validation_mismatched"]
    assert [stage_of(data, "val", i) for i in (0, 1)] == ["val", "val_mismatched"]
    assert data.place("validation") == "validation_matched.jsonl, the validation_matched set"
    wanted = {"train": 24, "validation": 9, "validation_mismatched": 5, "test": 6, "test_mismatched": 1}
    assert sizes(mnli, tiny) == wanted
    write(mnli / "validation.jsonl", ROWS[:3])  # a plain one is the first wherever it stands
    assert sizes(mnli, tiny, "val") == {"validation": 3, "validation_matched": 9, "validation_mismatched": 5}
    paths = {"train": str(mnli / "train.jsonl"), "train_more": str(mnli / "train.jsonl")}
    with pytest.raises(LoRAError, match=r"unknown split 'train_more'.*validation_NAME"):
        _ = TextClassificationData(paths, tiny.bert).tables


def test_hidden_labels_of_several_sets_are_for_prediction(tmp_path, tiny):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=LABELS))
    rows = [{"text": row["text"], "label": i % 2} for i, row in enumerate(ROWS)]
    hidden = [{**row, "label": -1} for row in rows]
    tables = {"train": rows, "validation_matched": rows[:6], "test_matched": hidden[:5], "test_mismatched": hidden[:4]}
    named = {name: datasets.Dataset.from_list(part, features=features) for name, part in tables.items()}
    datasets.DatasetDict(named).save_to_disk(tmp_path / "mnli")
    assert sizes(tmp_path / "mnli", tiny, "predict") == {"predict": 5, "predict_mismatched": 4}


def test_a_run_reports_each_set_and_predicts_each(mnli, tiny, tmp_path):
    cli = LoRACLI(args=["fit", "-c", tiny.config, "--data.path", str(mnli), "--trainer.max_epochs", "1"])
    folder = tmp_path / "runs" / "tiny"
    for command in ("test", "predict"):
        LoRACLI(args=[command, "--ckpt_path", str(folder)])
    report = json.loads((folder / "report.json").read_text())
    for end, rows in (("", ROWS[:6]), ("_mismatched", ROWS[6:7])):
        said = [json.loads(line) for line in (folder / f"version_0/predict/predictions{end}.jsonl").open()]
        right = [one["label"] == row["label"] for one, row in zip(said, rows, strict=True)]
        assert report[f"test{end}_accuracy"] == pytest.approx(sum(right) / len(right))
    assert {"val_accuracy", "val_mismatched_accuracy", "val_mismatched_loss"} <= set(report)
    assert {"val/accuracy", "val_mismatched/accuracy"} <= by_step(folder / "version_0").keys()
    assert cli.trainer.checkpoint_callback.monitor == "val/accuracy"
    assert not [key for key in cli.model.state_dict() if "task" in key]


def test_lists_of_loaders_are_counted_by_number_and_anew_each_time(tmp_path):
    rows = [{"input": torch.randn(2), "labels": torch.tensor(i % 2)} for i in range(20)]
    loaders = [torch.utils.data.DataLoader(part, batch_size=4) for part in (rows, rows[:11], rows[11:])]
    module = LoRAModule(
        nn.Sequential(nn.Linear(2, 2)), SequenceClassification(2), LoRAConfig(r=1, target_modules=["0"])
    )
    trainer = trainer_of(tmp_path, max_epochs=3, enable_checkpointing=False, num_sanity_val_steps=0)
    trainer.fit(module, loaders[0], loaders[1:])
    shown = {name: float(value) for name, value in trainer.callback_metrics.items()}
    again = trainer.validate(module, loaders[1:], verbose=False)
    for i, (stage, part) in enumerate((("val", rows[:11]), ("val_1", rows[11:]))):
        logits = module(torch.stack([row["input"] for row in part])).detach()
        labels = torch.stack([row["labels"] for row in part])
        assert shown[f"{stage}/accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
        assert shown[f"{stage}/loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
        assert again[i][f"{stage}/accuracy"] == pytest.approx(shown[f"{stage}/accuracy"])
