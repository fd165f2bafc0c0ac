"""What a user gives and the data do not say is the run's, and what the data hold is compared with the model."""

import json
from pathlib import Path

import pytest
import yaml

from lora_lightning.__main__ import main
from lora_lightning.cli.main import LoRACLI
from tests.command.process import command

OWN = "tests.command.own_data"
TASKS = {
    "ImageClassification": ({"num_classes": 4}, "Net", "Pictures"),
    "TokenClassification": ({"label_names": ["A", "B", "O"], "entities": False}, "Tagger", "Words"),
}


def config_of(folder, task, args):
    _, backbone, data = TASKS[task]
    data = {"class_path": f"{OWN}.{data}"}
    config = {
        "name": task,
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
        "model": {
            "backbone": {"class_path": f"{OWN}.{backbone}"},
            "task": {"class_path": f"lora_lightning.{task}", "init_args": args},
            "lora": {"r": 2, "target_modules": ["1"]},
        },
        "data": {
            "class_path": "lora_lightning.DatasetData",
            "init_args": {"train": data, "validation": data, "test": data, "batch_size": 4},
        },
    }
    file = folder / f"{task}.yaml"
    file.write_text(yaml.safe_dump(config))
    return str(file)


@pytest.mark.parametrize("task", TASKS)
def test_a_count_that_a_user_gave_is_in_the_saved_config(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = TASKS[task][0]
    LoRACLI(args=["fit", "--config", config_of(tmp_path, task, given)])
    saved = yaml.safe_load((tmp_path / f"runs/{task}/version_0/config.yaml").read_text())
    assert saved["model"]["task"]["init_args"].items() >= given.items()
    for name in ("test", "predict", "export"):
        LoRACLI(args=[name, "--ckpt_path", f"runs/{task}"])
    LoRACLI(args=["fit", "--config", f"runs/{task}/version_0/config.yaml"])


@pytest.mark.parametrize("task", TASKS)
def test_a_count_that_nobody_gave_is_one_sentence(task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = next(iter(TASKS[task][0]))
    monkeypatch.setattr("sys.argv", ["lora-lightning", "fit", "--config", config_of(tmp_path, task, {})])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert f"model.task.init_args.{name}" in said[0]
    assert "TypeError" not in said[0]


def test_rows_longer_than_the_models_positions_end_a_fit_before_its_first_step(tiny, tmp_path, monkeypatch, capsys):
    """The tiny model knows 32 positions."""
    (tmp_path / "long.csv").write_text("text,label\n" + "".join(f"{'film ' * 40},{i % 2}\n" for i in range(20)))
    given = ["fit", "--config", tiny.config, "--data.path", "long.csv", "--data.split.group_by", "null"]
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, *given, "--data.max_length", "32")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, *given, "--data.max_length", "100", "--name", "long")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "long.csv" in said
    assert "12 of 12 rows" in said
    assert "32 positions" in said
    assert "max_length" in said
    assert not list(tmp_path.glob("runs/long/*/checkpoints"))


@pytest.fixture
def hold_out(tiny, tmp_path, monkeypatch):
    """20 rows of one label alone, and no train split."""
    lines = Path(tiny.reviews).read_text().splitlines(keepends=True)
    rows = [line for line in lines if ",fresh," in line or line.startswith("text,")][:21]
    (tmp_path / "hold.csv").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hold.csv"


@pytest.mark.parametrize("path", ["hold.csv", "{test: hold.csv}"])
@pytest.mark.parametrize("names", [[], ["--data.label_names", "[fresh,rotten]"]])
def test_all_rows_of_a_named_file_are_tested_beside_the_run(trained, hold_out, path, names, monkeypatch, capsys):
    """A trained run knows its labels; no train split is asked for."""
    command(monkeypatch, "test", "--ckpt_path", trained)
    before = (trained / "report.json").read_bytes(), (trained / "test/metrics.csv").read_bytes()
    capsys.readouterr()
    command(monkeypatch, "test", "--ckpt_path", trained, "--data.path", path, *names)
    shown = capsys.readouterr().out
    assert "20 of hold.csv" in shown
    assert "rows: test 20" in shown
    assert (trained / "test_hold/metrics.csv").is_file()
    report = json.loads((trained / "test_hold/report.json").read_text())
    assert report["test_rows"] == 20
    assert report["data"]["rows"] == {"test": 20}
    assert "Data" in (trained / "test_hold/report.html").read_text()
    assert before == ((trained / "report.json").read_bytes(), (trained / "test/metrics.csv").read_bytes())


def test_predictions_carry_the_columns_that_are_asked_for(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "new.csv").write_text("id,text,film\n7,a lovely story,one\n9,a dull film,two\n")
    monkeypatch.chdir(tmp_path)
    given = ["predict", "--ckpt_path", trained, "--data.path", "new.csv"]
    for columns, own in (([], {"id": [7, 9]}), (["--columns", "film,text"], {"film": ["one", "two"]})):
        command(monkeypatch, *given, *columns)
        rows = [json.loads(line) for line in (trained / "predict/predictions.jsonl").read_text().splitlines()]
        assert [row["row"] for row in rows] == [0, 1]
        for name, values in own.items():
            assert [row[name] for row in rows] == values
    assert rows[0]["text"] == "a lovely story"
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, *given, "--columns", "flim")
    assert stopped.value.code == 2
    assert "did you mean 'film'" in capsys.readouterr().err
