"""What `lora-lightning new` is told, by flags and on a terminal, and what comes of it."""

import os
import select
import subprocess
import sys
import time
import tomllib
from datetime import date

import pytest
from packaging.requirements import Requirement

from lora_lightning.commands.new import PACKAGE, new
from lora_lightning.commands.projects import checks
from lora_lightning.commands.projects.checks import questions, requirement
from tests.command.process import REPOSITORY
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


@pytest.mark.parametrize("logger", ["wandb", "tensorboard", "mlflow"])
def test_a_logger_is_in_the_experiment_and_among_the_dependencies(logger, tmp_path):
    new("mine", logger=logger, git=False, defaults=True)
    found = parse([tmp_path / "mine/configs/experiment.yaml"]).trainer.logger[0].class_path
    assert logger in found.lower()
    needs = tomllib.loads((tmp_path / "mine/pyproject.toml").read_text())["project"]["dependencies"]
    assert logger == "wandb" or any(need.startswith(logger) for need in needs)


@pytest.mark.parametrize("license", ["MIT", "Apache-2.0", "BSD-3-Clause"])
def test_a_licence_names_who_and_when(license, tmp_path):
    new("mine", license=license, author="Ann O'Nymous", git=False, defaults=True)
    assert f"{date.today().year}" in (text := (tmp_path / "mine/LICENSE").read_text())
    assert "Ann O'Nymous" in text
    new("without", "image-classification", git=False, defaults=True)
    assert not (tmp_path / "without/LICENSE").exists()
    assert "Private :: Do Not Upload" in (tmp_path / "without/pyproject.toml").read_text(), "an upload is refused"
    assert tomllib.loads((tmp_path / "mine/pyproject.toml").read_text())["project"]["license"] == license


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
    monkeypatch.setattr(checks, "installable", lambda: None)  # as from an index
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


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal of Unix")
def test_on_a_terminal_what_no_flag_says_is_asked(tmp_path):
    screen, code = typed(["asked", "--task", "own", "--license", "none", "--git", "false"], tmp_path)
    assert code == 0, screen
    assert "The backbone" in screen
    assert "Where are runs tracked" in screen
    assert "What is to be learnt" not in screen
    assert "The licence" not in screen
    assert (tmp_path / "asked/configs/experiment.yaml").is_file()


def typed(args, folder):
    """What a terminal shows of `lora-lightning new`, with Enter as the answer to whatever it asks."""
    ours, theirs = os.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "lora_lightning", "new", *args],
        cwd=folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        ready, _, _ = select.select([ours], [], [], 0.3)
        try:
            if ready:
                shown += os.read(ours, 65536)
            elif running.poll() is None and shown:
                os.write(ours, b"\r")
            elif running.poll() is not None:
                break
        except OSError:  # the terminal is gone with the process
            break
    if running.poll() is None:
        running.terminate()
    os.close(ours)
    return shown.decode(errors="replace"), running.wait(10)
