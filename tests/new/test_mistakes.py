"""Mistakes end in one line, and nothing is written."""

import sys

import pytest

from lora_lightning.commands.new import new
from lora_lightning.lora.errors import LoRAError, MissingPackageError
from tests.command.process import command, files_in, mistake


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["3d"], "try 'project_3d'"),
        (["MyProject"], "try 'my_project'"),
        (["torch"], "would hide the installed package 'torch'"),
        (["class"], "try 'class_project'"),
        (["json"], "try 'json_project'"),
        ([], "new needs a name: lora-lightning new my_project"),
        (["mine", "--task", "chta"], "did you mean 'chat'?"),
        (["mine", "--logger", "wandbb"], "did you mean 'wandb'?"),
        (["mine", "--tsak", "chat"], "did you mean '--task'?"),
        (["mine", "--package", "nowhere"], "there is no 'nowhere'"),
        (["mine", "--template", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_answered_in_one_line(args, said, tmp_path, monkeypatch, capsys):
    assert said in mistake(monkeypatch, capsys, "new", *args)
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_and_a_missing_copier_leave_everything_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    new("mine", git=False, defaults=True)  # an empty one is taken
    before = files_in(tmp_path)
    with pytest.raises(LoRAError, match="'mine' is not empty, and nothing was written"):
        new("mine", "chat", git=False, defaults=True)
    monkeypatch.setitem(sys.modules, "copier", None)
    with pytest.raises(MissingPackageError):
        new("a_b-c", defaults=True)
    assert files_in(tmp_path) == before


def test_defaults_stands_alone_or_with_its_value(tmp_path, monkeypatch):
    for name, flags in (("one", ["--defaults"]), ("two", ["--defaults", "true"]), ("three", ["--defaults=false"])):
        given = ["--git", "false", name]
        command(monkeypatch, "new", *([*given, *flags] if flags == ["--defaults"] else [*flags, *given]))
        assert (tmp_path / name / "Makefile").is_file()
