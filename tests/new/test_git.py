"""A project begins with a commit, and a later template is brought in by `copier update`."""

import importlib.metadata
import json
import shutil
from types import SimpleNamespace

import copier
import pytest
import yaml

from lora_lightning.commands.new import TEMPLATE, new
from lora_lightning.commands.package_origin import template_origin
from tests.command.process import REPOSITORY
from tests.new.projects import git


def test_a_project_begins_with_a_commit_by_its_author_and_within_a_repository_belongs_to_it(person, tmp_path):
    new("mine", license="MIT", defaults=True)
    assert git(tmp_path / "mine", "log", "--format=%an %s") == "Ann Start from the template of lora_lightning"
    assert git(tmp_path / "mine", "status", "--porcelain") == ""
    assert "Copyright (c)" in (text := (tmp_path / "mine/LICENSE").read_text())
    assert "Ann" in text
    git(tmp_path, "init", "--quiet")
    new("within", defaults=True)
    assert not (tmp_path / "within/.git").exists(), "it belongs to the repository around it"


def test_who_has_not_told_git_their_name_commits_themselves(person, tmp_path, capsys):
    person.write_text("[user]\nuseConfigOnly = true\n")
    new("mine", defaults=True)
    assert (tmp_path / "mine/.git").is_dir()
    assert "with a first commit" not in capsys.readouterr().out


@pytest.fixture
def versions(person, tmp_path):
    """This repository as copier sees it, in two versions."""
    there = tmp_path / "lora_lightning.git"
    shutil.copytree(REPOSITORY / "lora_lightning/template", there / "lora_lightning/template")
    shutil.copy(REPOSITORY / "copier.yml", there)
    git(there, "init", "--quiet")
    git(there, "add", "--all")
    git(there, "commit", "--quiet", "--message", "first")
    git(there, "tag", "v0.1.0")
    template = there / "lora_lightning/template/project"
    with (template / "Makefile.jinja").open("a") as file:
        file.write("\nlater: ## What a later template brings\n\t@echo later\n")
    (template / "configs/precision/later.yaml.jinja").write_text("# Overlay: later.\nname: {{ package }}\n")
    rows = there / "lora_lightning/template/parts/rows/chats.jsonl"
    rows.write_text(rows.read_text().replace("plus", "and"))
    git(there, "add", "--all")
    git(there, "commit", "--quiet", "--message", "second")
    git(there, "tag", "v0.2.0")
    return there


def test_update_brings_what_is_new_and_keeps_what_is_ones_own(versions, tmp_path):
    new("mine", "chat", template=str(versions), template_ref="v0.1.0", defaults=True)
    mine = tmp_path / "mine"
    assert yaml.safe_load((mine / ".copier-answers.yml").read_text())["_commit"] == "v0.1.0"
    experiment = mine / "configs/experiment.yaml"
    experiment.write_text(experiment.read_text().replace("r: 8 ", "r: 64"))
    makefile = mine / "Makefile"
    makefile.write_text(makefile.read_text().replace("Train the experiment", "Train ours"))
    (mine / "data/chats.jsonl").write_text('{"messages": []}\n')
    (mine / "configs/strategy/ddp.yaml").unlink()
    git(mine, "commit", "--quiet", "--all", "--message", "ours")
    copier.run_update(mine, defaults=True, overwrite=True, quiet=True)
    assert "r: 64" in experiment.read_text()
    assert "Train ours" in makefile.read_text()
    assert "What a later template brings" in makefile.read_text()
    assert (mine / "configs/precision/later.yaml").read_text() == "# Overlay: later.\nname: mine\n"
    assert (mine / "data/chats.jsonl").read_text() == '{"messages": []}\n'
    assert not (mine / "configs/strategy/ddp.yaml").exists()
    answers = yaml.safe_load((mine / ".copier-answers.yml").read_text())
    assert (answers["_commit"], answers["task"], answers["_src_path"]) == ("v0.2.0", "chat", str(versions))


def test_a_project_of_the_package_is_that_of_the_repository(versions, tmp_path):
    new("of_package", "chat", git=False, defaults=True)
    new("of_repository", "chat", template=str(versions), template_ref="v0.1.0", git=False, defaults=True)
    one, other = ({} for _ in range(2))
    for name, found in (("of_package", one), ("of_repository", other)):
        for path in (path for path in (tmp_path / name).rglob("*") if path.is_file()):
            found[str(path.relative_to(tmp_path / name)).replace(name, "NAME")] = path.read_text().replace(name, "NAME")
        del found[".copier-answers.yml"]
    assert one == other


def told_by_pip(monkeypatch, **said):
    """As if pip had installed the package from there."""
    told = SimpleNamespace(read_text=lambda name: json.dumps(said) if name == "direct_url.json" else None)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: told)


def test_a_package_names_its_repository_with_its_commit_and_a_clone_as_long_as_it_has_not_moved_on(
    versions, tmp_path, monkeypatch
):
    told_by_pip(monkeypatch, url="https://example.org/l.git", vcs_info={"vcs": "git", "commit_id": "abc123"})
    assert template_origin(TEMPLATE) == {"_src_path": "git+https://example.org/l.git", "_commit": "abc123"}
    git(versions, "checkout", "--quiet", "v0.1.0")
    installed = tmp_path / "site-packages/lora_lightning/template"
    shutil.copytree(versions / "lora_lightning/template", installed)
    told_by_pip(monkeypatch, url=versions.as_uri(), dir_info={})
    assert template_origin(installed) == {"_src_path": str(versions), "_commit": "v0.1.0"}
    git(versions, "checkout", "--quiet", "v0.2.0")
    assert template_origin(installed) == {}
    told_by_pip(monkeypatch)  # of a clone that the package lies in, by its remote where that has the commit
    git(tmp_path, "clone", "--quiet", str(versions), "mine")
    template = tmp_path / "mine/lora_lightning/template"
    assert template_origin(template) == {"_src_path": str(versions), "_commit": "v0.2.0"}
    git(tmp_path / "mine", "commit", "--quiet", "--allow-empty", "--message", "unpublished")
    assert template_origin(template)["_src_path"] == str(tmp_path / "mine")
    monkeypatch.setattr("lora_lightning.commands.new.TEMPLATE", template)
    new("project", "own", git=False, defaults=True)
    answers = yaml.safe_load((tmp_path / "project/.copier-answers.yml").read_text())
    assert answers["_src_path"] == str(tmp_path / "mine"), "where copier's update will look"
