"""The whole job through the installed command: fit, test, export, and others open what came out."""

import json

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_lightning import LoRAConfig, LoRAError, LoRAModule, SequenceClassification, huggingface
from lora_lightning.cli.main import LoRACLI
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from tests.command.process import command, run
from tests.tiny import make_bert

KEYS = {
    "val_accuracy", "test_accuracy", "trainable", "total", "w0_unchanged", "export_max_rel_diff", "adapter_dir",
    "merged_dir", "train_seconds",
}  # fmt: skip


def test_whole_flow_on_a_tiny_bert(tiny, tmp_path, monkeypatch, capsys):
    """The fit in a shell of its own; what follows reads files alone."""
    run("fit", "--config", tiny.config, cwd=tmp_path)
    command(monkeypatch, "test", "--config", tiny.config, "--ckpt_path", "best")
    capsys.readouterr()
    command(monkeypatch, "export", "--ckpt_path", "runs/tiny")
    shown = capsys.readouterr().out

    report = json.loads((tmp_path / "runs/tiny/report.json").read_text())
    assert set(report) >= KEYS
    assert report["val_accuracy"] > 0.85
    assert report["test_accuracy"] > 0.75
    assert report["w0_unchanged"] is True
    assert report["export_max_rel_diff"] <= 1e-5
    assert report["trainable"] == 3906
    words = ("trainable parameters", "W0 before, after", "unchanged", "merged against adapted")
    assert all(text in shown for text in (*words, report["merged_dir"]))
    made = {p.name for p in (tmp_path / "runs/tiny/version_0").iterdir()}
    assert {"config.yaml", "checkpoints", "metrics.csv", "report.json", "export", "test"} <= made

    texts = ["the film is lovely and warm", "a dull story of two friends", "clumsy"]
    batch = AutoTokenizer.from_pretrained(tmp_path / report["merged_dir"])(texts, padding=True, return_tensors="pt")
    module = LoRAModule(
        huggingface(tiny.bert, label_names=["fresh", "rotten"]),
        SequenceClassification(2),
        LoRAConfig(r=4, modules_to_save=["classifier"]),
    ).eval()
    module.load_state_dict(load_checkpoint(tmp_path / "runs/tiny/version_0/checkpoints/best.ckpt")["state_dict"])
    with torch.no_grad():
        ours = module.backbone(**batch).logits
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / report["merged_dir"])
        assert merged.config.id2label == {0: "fresh", 1: "rotten"}
        peft = PeftModel.from_pretrained(huggingface(tiny.bert, num_labels=2), tmp_path / report["adapter_dir"]).eval()
        for other in (merged(**batch).logits, peft(**batch).logits):
            assert float((other - ours).abs().max() / ours.abs().max()) <= 1e-5
        assert [merged.config.id2label[int(i)] for i in ours.argmax(1)] == ["fresh", "rotten", "rotten"]


@pytest.mark.slow  # tests/training/test_averaging.py holds it without the command
def test_two_processes_equal_one_with_twice_the_batch(tiny, tmp_path, monkeypatch):
    """Law 9, through the command and the overlay that a user would take."""
    from tests.command.process import REPOSITORY

    overlay = REPOSITORY / "configs/strategy/ddp.yaml"
    common = ["--config", tiny.config, "--trainer.max_epochs", "2", "--model.lr_scheduler", "null"]
    common += ["--trainer.precision", "64-true"]  # where another order of a sum is not seen
    command(monkeypatch, "fit", *common, "--name", "one", "--data.init_args.batch_size", "16")
    run("fit", *common, "--name", "two", "--data.init_args.batch_size", "8", "--config", overlay, cwd=tmp_path)
    one, two = (load_checkpoint(tmp_path / f"runs/{n}/version_0/checkpoints/last.ckpt") for n in ("one", "two"))
    assert one["global_step"] == two["global_step"] > 5
    for key, value in one["state_dict"].items():
        assert float((two["state_dict"][key] - value).norm()) <= 1e-9 * float(value.norm()), key
    reports = [json.loads((tmp_path / f"runs/{n}/report.json").read_text()) for n in ("one", "two")]
    assert reports[0]["val_accuracy"] == pytest.approx(reports[1]["val_accuracy"])
    assert reports[0]["val_loss"] == pytest.approx(reports[1]["val_loss"], rel=1e-6)


def test_a_run_of_another_folder_is_tested_and_predicted_without_a_config(trained, tmp_path, monkeypatch, recwarn):
    command(monkeypatch, "validate", "--ckpt_path", trained)
    (tmp_path / "new.csv").write_text("text\nthe film is lovely and warm\na clumsy and empty story\n")
    only = ["--data.path", "{predict: new.csv}", "--ckpt_path", trained]
    config = yaml.safe_load((trained / "config.yaml").read_text())
    config["data"]["init_args"].pop("label_names")  # as in a config before its first fit: they are the run's
    (tmp_path / "before.yaml").write_text(yaml.safe_dump(config))
    bare = ["--data.path", "new.csv", "--ckpt_path", trained]  # the whole file, not its share for test
    for given in (only, ["--config", tmp_path / "before.yaml", *only], bare):
        command(monkeypatch, "predict", *given)
        lines = (trained / "predict" / "predictions.jsonl").read_text().splitlines()
        assert [json.loads(line)["label"] for line in lines] == ["fresh", "rotten"]
    assert not [w for w in recwarn if "best so far" in str(w.message)]  # without a validation set to choose by
    assert not [*trained.glob("*/checkpoints")], "a command that trains nothing has copied one"
    command(monkeypatch, "predict", "--ckpt_path", trained / "checkpoints" / "last.ckpt")
    lines = (trained / "predict" / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["row"] for row in rows] == list(range(40))
    assert {row["label"] for row in rows} == {"fresh", "rotten"}
    assert all(sum(row["probabilities"]) == pytest.approx(1, abs=1e-5) for row in rows)


def test_a_run_is_exported_onto_another_base_aloud_and_not_without_data(tiny, trained, tmp_path, monkeypatch, capsys):
    """In this process: the parser is the command's own."""
    config = yaml.safe_load((trained / "config.yaml").read_text())
    args = config["model"]["backbone"]["init_args"]
    args["pretrained_model_name_or_path"] = str(make_bert(tmp_path / "other", seed=1))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
    given = ["export", "--config", tmp_path / "other.yaml", "--ckpt_path", trained, "--output_dir", tmp_path / "out"]
    given += ["--dtype", "float16", "--max_shard_size", "20KB", "--model.allow_other_base", "true"]
    with pytest.warns(UserWarning, match="allow_other_base: the adapter was made on another base"):
        LoRACLI(args=[str(arg) for arg in given])
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert report["probe"] == "the data's first batch"
    assert report["dtype"] == "float16"
    assert report["merged_files"] > 1
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "merged")
    assert merged.config.id2label == {0: "fresh", 1: "rotten"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "merged")("dull").input_ids
    shown = capsys.readouterr().out
    assert "merged weights" in shown
    assert "float16" in shown
    config.pop("data")
    config["model"]["task"]["init_args"]["num_classes"] = 2
    args["label_names"] = ["fresh", "rotten"]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
    with (
        pytest.warns(UserWarning, match="allow_other_base"),
        pytest.raises(LoRAError, match="give the config a data section, or the model an example_input_array"),
    ):
        LoRACLI(args=[str(arg) for arg in given])
