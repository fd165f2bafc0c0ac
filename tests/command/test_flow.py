"""Law 9 through the command, and what is done with a run that lies elsewhere."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_lightning.cli.main import LoRACLI
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from tests.command.process import REPOSITORY, command, mistake, run
from tests.tiny import make_bert


@pytest.mark.slow  # tests/training/test_averaging.py holds it without the command
def test_two_processes_equal_one_with_twice_the_batch(tiny, tmp_path, monkeypatch):
    """Law 9, through the command and the overlay that a user would take."""
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
    rows = [json.loads(line) for line in (trained / "predict/predictions.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(40))
    assert all(sum(row["probabilities"]) == pytest.approx(1, abs=1e-5) for row in rows)


def test_a_run_is_exported_onto_another_base_aloud(tiny, trained, tmp_path, monkeypatch, capsys):
    config = yaml.safe_load((trained / "config.yaml").read_text())
    args = config["model"]["backbone"]["init_args"]
    args["pretrained_model_name_or_path"] = str(make_bert(tmp_path / "other", seed=1))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
    given = ["export", "--config", tmp_path / "other.yaml", "--ckpt_path", trained, "--output_dir", tmp_path / "out"]
    given += ["--dtype", "float16", "--max_shard_size", "20KB", "--model.allow_other_base", "true"]
    with pytest.warns(UserWarning, match="allow_other_base"):
        LoRACLI(args=[str(arg) for arg in given])
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert report["dtype"] == "float16"
    assert report["merged_files"] > 1
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "merged")
    assert merged.config.id2label == {0: "fresh", 1: "rotten"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "merged")("dull").input_ids
    assert "float16," in capsys.readouterr().out


# ---- a run of many GPUs on a machine that has none


@pytest.fixture
def of_many(trained):
    places = {"accelerator": "gpu", "devices": "8", "num_nodes": "2", "strategy": "ddp"}
    flags = [word for name, value in places.items() for word in (f"--trainer.{name}", value)]
    return ["--config", str(trained / "config.yaml"), *flags, "--ckpt_path", str(trained)]


def test_a_run_of_many_gpus_is_exported_in_one_process_anywhere(of_many, tmp_path):
    LoRACLI(args=["export", *of_many, "--formats", "adapter", "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the line is for machines without a GPU")
def test_it_is_tested_on_one_device_with_an_overlay_and_said_in_one_line_without(of_many, monkeypatch, capsys):
    assert "--trainer.accelerator gpu" in mistake(monkeypatch, capsys, "test", *of_many)
    cli = LoRACLI(args=["test", *of_many, "--config", str(REPOSITORY / "configs/strategy/single.yaml")])
    assert cli.trainer.world_size == 1
    assert float(cli.trainer.callback_metrics["test/accuracy"]) > 0.75


# ---- data that are given beside a run


@pytest.fixture
def hold_out(tiny, tmp_path, monkeypatch):
    """20 rows of one label alone, and no train split."""
    lines = Path(tiny.reviews).read_text().splitlines(keepends=True)
    rows = [line for line in lines if ",fresh," in line or line.startswith("text,")][:21]
    (tmp_path / "hold.csv").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hold.csv"


@pytest.mark.parametrize(
    ("path", "names"), [("hold.csv", []), ("{test: hold.csv}", ["--data.label_names", "[fresh,rotten]"])]
)
def test_all_rows_of_a_named_file_are_tested_beside_the_run(trained, hold_out, path, names, monkeypatch, capsys):
    """A trained run knows its labels; no train split is asked for."""
    command(monkeypatch, "test", "--ckpt_path", trained)
    before = (trained / "report.json").read_bytes(), (trained / "test/metrics.csv").read_bytes()
    capsys.readouterr()
    command(monkeypatch, "test", "--ckpt_path", trained, "--data.path", path, *names)
    shown = capsys.readouterr().out
    assert "20 of hold.csv" in shown
    assert "rows: test 20" in shown
    assert "Data" in (trained / "test_hold/report.html").read_text()
    assert before == ((trained / "report.json").read_bytes(), (trained / "test/metrics.csv").read_bytes())


def test_a_report_has_no_test_of_an_earlier_best_and_no_test_counts_trained_rows(tiny, tmp_path, monkeypatch):
    (tmp_path / "reviews.csv").write_bytes(Path(tiny.reviews).read_bytes())
    run, fit = tmp_path / "runs/tiny/version_0", ("fit", "-c", tiny.config, "--data.path", "reviews.csv")
    command(monkeypatch, *fit, "--trainer.max_epochs", "1")
    command(monkeypatch, "test", "--ckpt_path", run)
    command(monkeypatch, *fit, "--ckpt_path", "last")
    assert not [name for name in json.loads((run / "report.json").read_text()) if name.startswith("test_")]
    monkeypatch.chdir("/")  # from where the file that was trained on is known too
    command(monkeypatch, "test", "--ckpt_path", run, "--data.path", tmp_path / "reviews.csv")
    assert json.loads((run / "report.json").read_text())["test_rows"] == 40


def test_predictions_carry_the_columns_that_are_asked_for(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "new.csv").write_text("id,text,label\n7,a lovely story,rotten\n9,a dull film,fresh\n")
    monkeypatch.chdir(tmp_path)
    given = ["predict", "--ckpt_path", trained, "--data.path", "new.csv"]
    for columns, own in (([], {"id": [7, 9]}), (["--columns", "label,text"], {"data_label": ["rotten", "fresh"]})):
        command(monkeypatch, *given, *columns)
        rows = [json.loads(line) for line in (trained / "predict/predictions.jsonl").read_text().splitlines()]
        assert [row["row"] for row in rows] == [0, 1]
        for name, values in own.items():
            assert [row[name] for row in rows] == values
    assert rows[0]["text"] == "a lovely story"
