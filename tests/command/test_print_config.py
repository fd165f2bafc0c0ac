"""What `--print_config` prints is a file that runs, and says what the command line said."""

import contextlib
import os
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
