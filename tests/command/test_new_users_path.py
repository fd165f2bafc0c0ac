"""What a new user does in the first week, as one path through the installed command."""

import csv
import json
import random

import pytest
import torch
import yaml
from peft import AutoPeftModelForSequenceClassification, PeftConfig
from transformers import AutoTokenizer

from tests.command.process import run
from tests.tiny import make_bert, review


def write_csv(file, rows, *, seed, labelled=True):
    """Tickets: an id, the text under a name of its own and, if asked for, the label under another."""
    draw = random.Random(seed)
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["ticket", "id", "message", *(["queue"] if labelled else [])])
        for row in range(rows):
            good = draw.random() < 0.5
            own = [f"T-{seed}-{row}", 1000 * seed + row, review(draw, good)]
            writer.writerow([*own, *(["praise" if good else "complaint"] if labelled else [])])
    return file


@pytest.mark.slow  # five processes
def test_the_path_of_a_new_user(tmp_path):
    """An own CSV, a test on a hold-out file, predictions with ids, an export, opened by PEFT."""
    bert = make_bert(tmp_path / "bert")
    write_csv(tmp_path / "tickets.csv", 200, seed=1)
    write_csv(tmp_path / "hold.csv", 60, seed=2)
    write_csv(tmp_path / "new.csv", 10, seed=3, labelled=False)
    data = {"path": "tickets.csv", "tokenizer": str(bert), "text_column": "message", "label_column": "queue"}
    config = {
        "name": "tickets",
        "trainer": {"max_epochs": 6, "accelerator": "cpu", "enable_progress_bar": False},
        "model": {
            "backbone": {
                "class_path": "lora_lightning.huggingface",
                "init_args": {"pretrained_model_name_or_path": str(bert)},
            },
            "task": {"class_path": "lora_lightning.SequenceClassification"},
            "lora": {"r": 4, "modules_to_save": ["classifier"]},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
        "data": {"class_path": "lora_lightning.TextClassificationData", "init_args": data},
    }
    (tmp_path / "tickets.yaml").write_text(yaml.safe_dump(config))
    version = tmp_path / "runs/tickets/version_0"

    run("fit", "--config", "tickets.yaml", cwd=tmp_path)
    run("test", "--ckpt_path", "runs/tickets", cwd=tmp_path)
    before = json.loads((version / "report.json").read_text())

    tested = run("test", "--ckpt_path", "runs/tickets", "--data.path", "hold.csv", cwd=tmp_path)
    assert "60 of hold.csv" in tested.stdout
    own = json.loads((version / "test_hold/report.json").read_text())
    assert own["test_rows"] == 60
    assert own["test_accuracy"] > 0.8
    assert json.loads((version / "report.json").read_text()) == before

    predict = ["predict", "--ckpt_path", "runs/tickets", "--data.path", "new.csv"]
    run(*predict, "--columns", "ticket,message", cwd=tmp_path)
    found = [json.loads(line) for line in (version / "predict/predictions.jsonl").read_text().splitlines()]
    given = list(csv.DictReader((tmp_path / "new.csv").open()))
    assert [row["row"] for row in found] == list(range(10))
    assert [(row["ticket"], row["message"]) for row in found] == [(row["ticket"], row["message"]) for row in given]
    assert {row["label"] for row in found} <= {"praise", "complaint"}

    run("export", "--ckpt_path", "runs/tickets", cwd=tmp_path)
    adapter = tmp_path / before["run_dir"] / "export/adapter"
    assert PeftConfig.from_pretrained(adapter).peft_type == "LORA"
    model = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=2).eval()
    batch = AutoTokenizer.from_pretrained(bert)([row["message"] for row in given], padding=True, return_tensors="pt")
    with torch.no_grad():
        said = model(**batch).logits.softmax(-1)
    torch.testing.assert_close(said, torch.tensor([row["probabilities"] for row in found]), atol=1e-4, rtol=0)
