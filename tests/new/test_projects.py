"""Every task's project is whole, understood by `fit`, and trains at once on rows of its own."""

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from lora_lightning import SplitConfig
from lora_lightning.cli.main import LoRACLI
from tests.command.process import REPOSITORY
from tests.new.projects import configs_of, make, offline
from tests.recipes.recipe import parse

OVERLAYS = ["experiments/wider", "own", "debug", "logger/tensorboard", "logger/wandb"]
OVERLAYS += ["precision/bf16-base", "strategy/ddp"]
EXTRAS = {"for_image_classification": {"vision"}, "for_segmentation": {"vision"}, "for_seq2seq": {"text-metrics"}}
ON_A_CPU = ["--trainer.accelerator", "cpu", "--trainer.logger", "null", "--trainer.enable_progress_bar", "false"]


def test_a_project_has_all_its_parts_and_can_be_read_in_ten_minutes(project):
    files = [path.relative_to(project) for path in project.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {Path(name) for name in ("README.md", "Makefile", ".ci/run", ".github/workflows/ci.yml")} < set(files)
    assert {Path(name) for name in (".gitignore", ".env.example", ".pre-commit-config.yaml", "LICENSE")} < set(files)
    texts = {file: (project / file).read_text() for file in files if file.suffix != ".png"}
    for file, text in texts.items():
        assert text.endswith("\n"), file
        assert not text.endswith("\n\n"), file
        unrendered = re.findall(r"\{%|(?<!\$)\{\{", text)  # but for GitHub's ${{ and a chat template
        assert not unrendered or file.parent.name == "tokenizer", file
    to_read = [file for file in texts if file.parts[0] != "data" and file.name != "LICENSE"]
    assert len(to_read) <= 28
    assert sum(len(texts[file].splitlines()) for file in to_read) < 700
    rows = [text for file, text in texts.items() if file.suffix == ".jsonl"]
    assert all(20 <= len(text.splitlines()) <= 60 for text in rows)
    assert rows or any(file.suffix == ".png" for file in files) or project.name == "for_own"


def test_ruff_finds_nothing_in_any_project(projects):
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", str(projects)]
        done = subprocess.run(ruff, check=False, capture_output=True, text=True)
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
    ours = needs["lora_lightning"]
    assert ours.url or ours.specifier.contains(version("lora_lightning"))
    assert needs["lora_lightning"].extras == EXTRAS.get(project.name, set())
    assert all(need.specifier or need.url for need in needs.values())
    assert yaml.safe_load((project / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    answers = yaml.safe_load((project / ".copier-answers.yml").read_text())
    assert answers["project"] == project.name


def test_pre_commit_takes_the_projects_config(projects):
    pytest.importorskip("pre_commit")
    config = next(projects.iterdir()) / ".pre-commit-config.yaml"
    subprocess.run([sys.executable, "-m", "pre_commit", "validate-config", str(config)], check=True)


def arguments(files, runs):
    """Of a quiet run on a CPU."""
    return [*(word for file in files for word in ("--config", str(file))), *ON_A_CPU, "--runs_dir", str(runs)]


def test_its_own_parts_train_on_its_rows_at_once(project, tmp_path):
    files = configs_of(project, "experiment", *offline(project), "own", "debug")
    LoRACLI(args=["fit", *arguments(files, tmp_path)])
    report = json.loads((tmp_path / "debug" / "report.json").read_text())
    assert report["w0_unchanged"]
    assert 0 < report["trainable"] < report["total"]


OTHERS = {  # rows whose columns have other names than the examples', how these are given, and what is read
    "text_classification": (
        [{"said": "a  &amp; b"}, {"said": None}],
        {"text_column": "said"},
        {"said": ["a & b", None]},
    ),
    "embedding": ([{"q": "a  b", "positive": "c\nd"}], {"anchor_column": "q"}, {"q": ["a b"], "positive": ["c d"]}),
    "token_classification": ([{"words": ["``", "-LRB-"]}], {"words_column": "words"}, {"words": [['"', "("]]}),
    "chat": ([{"question": " a? ", "answer": "b "}], {}, {"question": ["a?"], "answer": ["b"]}),
}


@pytest.mark.parametrize("task", OTHERS)
def test_its_own_data_puts_rows_in_order_whatever_their_columns_are_called(task, projects, tmp_path, monkeypatch):
    monkeypatch.chdir(projects / f"for_{task}")
    monkeypatch.syspath_prepend(".")
    rows, columns, read = OTHERS[task]
    (tmp_path / "mine.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    own = importlib.import_module(f"for_{task}.data").OwnData
    table = own(str(tmp_path / "mine.jsonl"), tokenizer="data/tokenizer", **columns).read()["train"]
    assert {name: list(table[name]) for name in read} == read


def test_its_own_data_takes_the_first_of_rows_that_say_the_same(projects, tmp_path, monkeypatch):
    monkeypatch.chdir(projects / "for_text_classification")
    monkeypatch.syspath_prepend(".")
    rows = [{"text": text, "label": label} for text, label in (("a b", 0), ("c", 1), ("a  b", 1), ("d", 0))]
    (tmp_path / "mine.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    own = importlib.import_module("for_text_classification.data").OwnData
    none = SplitConfig(validation=0, test=0)
    table = own(str(tmp_path / "mine.jsonl"), tokenizer="data/tokenizer", split=none).tables["train"]
    assert list(table["text"]) == ["a b", "c", "d"]


def test_its_own_loss_is_its_formula(project):
    """The project's own test of it, in a process of its own: each project has a package and a module of that name."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_loss.py"]
    done = subprocess.run(
        command,
        cwd=project,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert "1 passed" in done.stdout, done.stdout


@pytest.mark.slow  # what the project's own tests do, for every task
@pytest.mark.parametrize("own", [False, True])
def test_it_trains_tests_predicts_and_exports(project, own, tmp_path):
    files = configs_of(project, "experiment", *offline(project), *(["own"] if own else []), "debug")
    args = arguments(files, tmp_path)
    LoRACLI(args=["fit", *args])
    for command in ("test", "predict", "export"):
        LoRACLI(args=[command, *args, "--ckpt_path", "best"])
    assert json.loads((tmp_path / "debug" / "report.json").read_text())["export_max_rel_diff"] < 1e-4


@pytest.mark.slow  # mypy reads torch once
def test_mypy_finds_nothing_in_any_project(projects):
    packages = [project / project.name for project in sorted(projects.iterdir())]
    config = next(projects.iterdir()) / "pyproject.toml"
    said = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(config), *map(str, packages)],
        check=False,
        capture_output=True,
        text=True,
        cwd=projects,
        env={**os.environ, "MYPYPATH": str(REPOSITORY)},
    )
    assert said.returncode == 0, said.stdout


def test_make_help_lists_every_target(projects):
    project = projects / "for_chat"
    listed = re.findall(r"^  make ([a-z-]+)", make(project, "help"), re.M)
    assert listed == re.findall(r"^([a-z-]+):.*## ", (project / "Makefile").read_text(), re.M)
    assert {"plan", "fit", "resume", "sweep", "evaluate", "export", "test", "check"} < set(listed)
