"""What `--print_config` prints is a file that runs, and says what the command line said."""

import contextlib
import os
import shlex
from pathlib import Path

import pytest
import yaml

from tests.command.process import REPOSITORY, command


@pytest.fixture
def printed(monkeypatch, capsys, tmp_path):
    """A file of what a command line prints with `--print_config`."""

    def make(*args, name="printed.yaml"):
        capsys.readouterr()
        with contextlib.suppress(SystemExit):
            command(monkeypatch, *args, "--print_config")
        file = tmp_path / name
        file.write_text(capsys.readouterr().out)
        return file

    return make


OVERLAID = ["demo.yaml", "precision/bf16-base.yaml", "strategy/ddp.yaml", "debug.yaml"]


@pytest.mark.parametrize("files", [["demo-lm.yaml"], ["demo-vision.yaml"], OVERLAID], ids=lambda files: files[0])
def test_what_is_printed_is_read_as_it_was_said(files, printed, monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # where the recipes' own classes and files are
    args = [part for file in files for part in ("-c", str(REPOSITORY / "configs" / file))]
    first = printed("fit", *args)
    again = printed("fit", "-c", str(first), name="again.yaml")
    assert yaml.safe_load(again.read_text()) == yaml.safe_load(first.read_text())
    assert yaml.safe_load(first.read_text())["model"]["lora"]["r"] > 0


def test_it_runs_and_null_by_a_flag_is_null_within_a_section_of_a_class_too(tiny, printed, monkeypatch, tmp_path):
    file = printed("fit", "-c", tiny.config, "--trainer.max_epochs", "1", "--data.split.group_by", "null")
    assert yaml.safe_load(file.read_text())["data"]["init_args"]["split"]["group_by"] is None
    command(monkeypatch, "fit", "-c", file, "--name", "again")
    assert (tmp_path / "runs/again/version_0/report.json").is_file()
    saved = tmp_path / "runs/again/version_0/config.yaml"
    entered, chdir = [], os.chdir
    monkeypatch.setattr(os, "chdir", lambda folder: (entered.append(Path(folder).name), chdir(folder)))
    command(monkeypatch, "fit", "-c", saved, "--name", "saved")
    assert (tmp_path / "runs/saved/version_0/report.json").is_file()
    assert set(entered) == {"version_0", tmp_path.name}  # to read the file, and back
    assert entered.count("version_0") == 1, "the fit left its folder, from which a logger's thread writes"


def test_that_of_a_command_line_without_a_file_runs(tiny, printed, monkeypatch, tmp_path):
    line = (
        f"fit --model.backbone lora_lightning.huggingface --model.backbone.pretrained_model_name_or_path {tiny.bert}"
        " --model.task lora_lightning.SequenceClassification --model.lora.modules_to_save [classifier]"
        f" --data lora_lightning.TextClassificationData --data.path {tiny.reviews} --data.tokenizer {tiny.bert}"
        " --trainer.max_epochs 1 --trainer.accelerator cpu"
    )
    file = printed(*shlex.split(line))
    command(monkeypatch, "fit", "-c", file)
    assert (tmp_path / "runs/lora/version_0/report.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo.yaml", "demo-lm.yaml", "demo-vision.yaml"])
def test_the_demos_run_as_printed(name, printed, monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    file = printed("fit", "-c", REPOSITORY / "configs" / name)
    command(monkeypatch, "fit", "-c", file, "--trainer.fast_dev_run", "1", "--runs_dir", tmp_path / "runs")
