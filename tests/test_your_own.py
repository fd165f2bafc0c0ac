"""The page on one's own task, data and backbone does what it says: its blocks are run as they stand."""

import json
import re
import sys

import pytest

from lora_lightning.__main__ import main
from tests.command.process import REPOSITORY, run

PAGE = (REPOSITORY / "docs" / "your-own.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def write_files(folder):
    """Each block with a file's name in its first line, as that file."""
    for block in (*blocks("python"), *blocks("yaml")):
        (folder / block.partition("\n")[0].removeprefix("# ")).write_text(block)
    assert sorted(path.name for path in folder.iterdir()) == ["mine.py", "mine.yaml", "plain.py", "plain.yaml"]


def command(args, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lora-lightning", *args])
    monkeypatch.setattr("sys.path", [*sys.path])
    for module in ("mine", "plain"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    main()


def test_a_task_data_and_a_backbone_take_less_than_40_lines():
    code, _ = blocks("python")
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith("#")]
    assert 20 < len(lines) < 40


def test_the_file_beside_the_user_is_found_and_learns(tmp_path, monkeypatch):
    write_files(tmp_path)
    command(["fit", "--config", "mine.yaml", "--trainer.enable_progress_bar", "false"], monkeypatch)
    report = json.loads((tmp_path / "runs/mine/version_0/report.json").read_text())
    assert report["val_mae"] < 0.5, "1.6 before"
    assert report["w0_unchanged"]


def test_a_plain_module_and_a_dataset_need_nothing_of_this_package(tmp_path, monkeypatch):
    write_files(tmp_path)
    command(["fit", "--config", "plain.yaml", "--trainer.enable_progress_bar", "false"], monkeypatch)
    report = json.loads((tmp_path / "runs/plain/version_0/report.json").read_text())
    assert report["val_accuracy"] > 0.9
    assert report["w0_unchanged"]
    for name in ("test", "predict", "export"):
        command([name, "--ckpt_path", "runs/plain"], monkeypatch)
    assert "lora_lightning" not in blocks("python")[1]


@pytest.mark.parametrize(("old", "new", "said"), [("mine.Regression", "mine.Regresion", 0), ("width", "widht", 1)])
def test_a_wrong_name_is_answered_as_the_page_says(old, new, said, tmp_path, monkeypatch, capsys):
    write_files(tmp_path)
    config = tmp_path / "mine.yaml"
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(SystemExit):
        command(["fit", "--config", "mine.yaml"], monkeypatch)
    promised = [line for line in blocks("text")[0].splitlines() if line.startswith("lora-lightning: error")]
    assert promised[said] in capsys.readouterr().err.splitlines()


@pytest.mark.slow  # a process for each command
def test_the_commands_of_the_page_run_in_a_shell(tmp_path):
    write_files(tmp_path)
    for line in blocks("sh")[0].splitlines():
        run(*line.split()[1:], cwd=tmp_path)
    folder = tmp_path / "runs/mine/version_0"
    assert (folder / "export/merged/model.safetensors").is_file()
    assert len((folder / "predict/predictions.jsonl").read_text().splitlines()) == 64
    assert json.loads((folder / "report.json").read_text())["export_max_rel_diff"] < 1e-5
