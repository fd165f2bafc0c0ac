"""What `lora-lightning new` is told, by flags and on a terminal, and what comes of it."""

import sys
import tomllib
from datetime import date

import pytest
import yaml
from packaging.requirements import Requirement
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from lora_lightning.commands.new import PACKAGE, new, questions, requirement
from lora_lightning.lora.errors import LoRAError, MissingPackageError
from tests.command.process import REPOSITORY, files_in, mistake
from tests.new.test_git import told_by_pip
from tests.recipes.recipe import parse


@pytest.mark.parametrize(
    ("backbone", "task", "lines"),
    [
        ("package:some_model/model", "text-classification", ["tokenizer: package:some_model/model"]),
        ("own", "text-classification", ["class_path: mine.backbone.tiny", "tokenizer: data/tokenizer"]),
        ("some_net.Net", "multi-label", ["class_path: some_net.Net", "# modules_to_save: [head]"]),
        ("timm:resnet18", "image-classification", ["model_name: resnet18", "preprocessing: timm:resnet18"]),
        ("torchvision:resnet18", "image-classification", ["model_name: resnet18", "image_size: 224"]),
        ("own", "segmentation", ["class_path: mine.backbone.Tiny", "target_modules: [body.0, body.2]"]),
    ],
)
def test_a_backbone_may_be_named_in_any_way(backbone, task, lines, tmp_path, monkeypatch):
    new("mine", task, backbone, git=False, defaults=True)
    text = (tmp_path / "mine/configs/experiment.yaml").read_text()
    assert [line for line in lines if line not in text] == []
    if backbone != "some_net.Net":
        monkeypatch.syspath_prepend(str(tmp_path / "mine"))
        for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
            monkeypatch.delitem(sys.modules, name)
        assert parse([tmp_path / "mine/configs/experiment.yaml"]).data.class_path


@pytest.mark.parametrize(
    ("package", "needs"),
    [
        (None, "lora_lightning>=0.1,<0.2"),
        ("==0.1.0", "lora_lightning==0.1.0"),
        ("lora-lightning>=0.1", "lora_lightning>=0.1"),
        ("git+https://example.org/l.git@v1", "lora_lightning @ git+https://example.org/l.git@v1"),
    ],
)
def test_a_project_depends_on_what_package_says(package, needs, monkeypatch):
    monkeypatch.setattr("lora_lightning.commands.new.installable", lambda: None)  # as from an index
    assert requirement(package) == needs
    assert Requirement(needs)


def test_a_package_that_is_on_no_index_is_asked_for_where_it_came_from(tmp_path, monkeypatch):
    told_by_pip(monkeypatch, url="https://example.org/l.git", vcs_info={"vcs": "git", "commit_id": "abc123"})
    assert requirement(None) == "lora_lightning @ git+https://example.org/l.git@abc123"
    told_by_pip(monkeypatch, url=REPOSITORY.as_uri(), dir_info={"editable": True})
    assert Requirement(requirement(None)).url.startswith((REPOSITORY.as_uri(), "git+"))
    told_by_pip(monkeypatch)  # of a clone that is on the path alone
    assert Requirement(requirement(None)).url.startswith((REPOSITORY.as_uri(), "git+"))
    monkeypatch.setenv(PACKAGE, str(REPOSITORY))
    new("mine", "image-classification", git=False, defaults=True)
    needs = tomllib.loads((tmp_path / "mine/pyproject.toml").read_text())["project"]["dependencies"][0]
    assert needs == f"lora_lightning[vision] @ {REPOSITORY.as_uri()}", "a clone that is asked for"
    told = " ".join((new.__doc__ or "").split())
    for name in ("task", "logger", "license"):
        assert [c for c in questions()[name]["choices"].values() if c not in told] == [], name


@pytest.mark.parametrize(
    ("logger", "license"), [("wandb", "MIT"), ("tensorboard", "Apache-2.0"), ("mlflow", "BSD-3-Clause"), (None, None)]
)
def test_a_logger_and_a_licence_are_in_the_project(logger, license, tmp_path):
    new("mine", logger=logger, license=license, author="Ann O'Nymous", git=False, defaults=True)
    project = tomllib.loads((tmp_path / "mine/pyproject.toml").read_text())["project"]
    if logger is None:
        assert not (tmp_path / "mine/LICENSE").exists()
        assert "Private :: Do Not Upload" in project["classifiers"], "an upload is refused"
        return
    assert logger in parse([tmp_path / "mine/configs/experiment.yaml"]).trainer.logger[0].class_path.lower()
    assert logger == "wandb" or any(need.startswith(logger) for need in project["dependencies"])
    assert project["license"] == license
    text = (tmp_path / "mine/LICENSE").read_text()
    assert f"{date.today().year}" in text
    assert "Ann O'Nymous" in text


def test_on_a_terminal_what_no_flag_says_is_asked(tmp_path, monkeypatch):
    """The backbone, answered by Enter, and the logger, of which the second is taken."""
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("\r\x1b[B\r")
        keys.close()  # another question would end it
        new("asked", "own", license="none", git=False)
    answers = yaml.safe_load((tmp_path / "asked/.copier-answers.yml").read_text())
    assert (answers["backbone"], answers["logger"], answers["license"]) == ("own", "wandb", "none")


# ---- mistakes end in one line, and nothing is written


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
        (["mine", "--template_ref", "v1"], "name that with --template"),
    ],
)
def test_a_mistake_is_answered_in_one_line(args, said, tmp_path, monkeypatch, capsys):
    assert said in mistake(monkeypatch, capsys, "new", *args)
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_and_a_missing_copier_leave_everything_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    new("mine", git=False, defaults=True, template=str(REPOSITORY / "docs"))  # an empty one, and another's template
    before = files_in(tmp_path)
    with pytest.raises(LoRAError, match="'mine' is not empty, and nothing was written"):
        new("mine", "chat", git=False, defaults=True)
    monkeypatch.setitem(sys.modules, "copier", None)
    with pytest.raises(MissingPackageError):
        new("a_b-c", defaults=True)
    assert files_in(tmp_path) == before
