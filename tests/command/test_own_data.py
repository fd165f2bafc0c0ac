"""What a user gives and the data do not say is the run's, and what the data hold is compared with the model."""

import json
from pathlib import Path

import pytest

from tests.command.process import command, mistake


def test_rows_longer_than_the_models_positions_end_a_fit_before_its_first_step(tiny, tmp_path, monkeypatch, capsys):
    """The tiny model knows 32 positions."""
    (tmp_path / "long.csv").write_text("text,label\n" + "".join(f"{'film ' * 40},{i % 2}\n" for i in range(20)))
    given = ["fit", "--config", tiny.config, "--data.path", "long.csv", "--data.split.group_by", "null"]
    command(monkeypatch, *given, "--data.max_length", "32")
    said = mistake(monkeypatch, capsys, *given, "--data.max_length", "100", "--name", "long")
    for word in ("long.csv", "12 of 12 rows", "32 positions", "max_length"):
        assert word in said
    assert not list(tmp_path.glob("runs/long/*/checkpoints"))


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
