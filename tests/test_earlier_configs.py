"""A config of version 0.1 still means something: what it names is there, or one line says what to take.

What 0.1 had is read from the repository's own history.
"""

import ast
import io
import subprocess
import tarfile

import pytest
import yaml

import lora_lightning
from lora_lightning.cli.diagnostics import _arguments_of as arguments_of
from lora_lightning.cli.diagnostics import wrong_path
from lora_lightning.lora.errors import REMOVED
from tests.command.process import REPOSITORY, mistake
from tests.recipes.recipe import CONFIGS, parse

COMMIT = "b6a78d9"
GONE = {**REMOVED, **lora_lightning.GONE}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """The folders `configs` and `lora_lightning` of version 0.1."""
    what = ["git", "archive", COMMIT, "configs", "lora_lightning"]
    packed = subprocess.run(what, cwd=REPOSITORY, capture_output=True, check=False)
    if packed.returncode:
        pytest.skip(f"this clone has no commit {COMMIT}: git fetch --unshallow")
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def names(earlier):
    """Its public names, with their modules."""
    tree = ast.parse((earlier / "lora_lightning/__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    found = {one.name: node.module for node in imports if node.module.startswith("lora_") for one in node.names}
    assert len(found) > 60
    return found


def test_a_public_name_is_there_or_says_what_to_take_by_its_former_module_too(names):
    for name, module in names.items():
        said, by_module = wrong_path(f"lora_lightning.{name}"), wrong_path(f"{module}.{name}")
        if name in GONE:
            assert said == f"'lora_lightning.{name}': {GONE[name]}"
            assert by_module.endswith(f": {GONE[name]}")
        else:
            assert said is None
            assert by_module is None or by_module.endswith(f": take 'lora_lightning.{name}'")


def test_an_argument_is_taken_or_says_what_to_take(earlier, names):
    """Of what a config names: classes, and functions that make a model or a set."""
    trees = [ast.parse(file.read_text()) for file in (earlier / "lora_lightning").rglob("*.py")]
    top = {node.name: node for tree in trees for node in tree.body if hasattr(node, "name")}

    def arguments(made):
        if isinstance(made, ast.FunctionDef):
            return [one.arg for one in (*made.args.args, *made.args.kwonlyargs) if one.arg != "self"]
        fields = [one.target.id for one in made.body if isinstance(one, ast.AnnAssign) and one.target.id[0] != "_"]
        inits = [one for one in made.body if getattr(one, "name", "") == "__init__"]
        bases = [top[base.id] for base in made.bases if isinstance(base, ast.Name) and base.id in top]
        more = bases if not inits or inits[0].args.kwarg else []  # where its own go on to
        return [name for one in (*inits, *more) for name in arguments(one)] or fields

    makers = {"huggingface", "hub_dataset", "timm_model", "torchvision_model"}
    known = [n for n in names if n not in GONE and (n in makers or isinstance(top[n], ast.ClassDef))]
    found = {(name, argument) for name in known for argument in arguments(top[name]) if argument not in REMOVED}
    assert len(found) > 300
    assert [pair for pair in found if pair[1] not in arguments_of(f"lora_lightning.{pair[0]}")] == []


DEMOS = {"demo-lm.yaml": "demos.dialogues.DialogueData", "demo.yaml": "demos.baselines.Baselines"}
ALIKE = ("demo-vision.yaml", "demo-vision-dinov2.yaml")


def without_comments(file):
    return yaml.load(file.read_text(), yaml.CSafeLoader)


def test_a_config_is_todays_or_is_parsed_or_says_what_to_take(earlier, monkeypatch, capsys):
    """Today's are run by tests of their own: those of recipes, of overlays, of sweeps."""
    for file in sorted((earlier / "configs").rglob("*.yaml")):
        name = str(file.relative_to(earlier / "configs"))
        if not (CONFIGS / name).is_file():
            assert "take configs/strategy/fsdp2.yaml" in mistake(monkeypatch, capsys, "fit", "-c", f"configs/{name}")
        elif name in DEMOS:
            assert f"take {DEMOS[name]}" in mistake(monkeypatch, capsys, "fit", "-c", file)
        elif name not in ALIKE and without_comments(file) != without_comments(CONFIGS / name):
            assert parse(["glue/base.yaml", f"glue/tasks/{file.name}", file]).data.class_path


@pytest.mark.parametrize(
    ("overlay", "said"),
    [
        (
            "trainer: {strategy: {class_path: lora_lightning.FSDP2Strategy, init_args: {tensor_parallel_size: 2}}}",
            "over.yaml, line 1: lora_lightning.FSDP2Strategy takes no 'tensor_parallel_size' any more: leave it out",
        ),
        (
            "model:\n  task: {class_path: lora_lightning.tasks.sequence_classification.SequenceClassification}\n",
            "over.yaml, line 2: model.task: there is no 'lora_lightning.tasks.sequence_classification': take"
            " 'lora_lightning.SequenceClassification'",
        ),
    ],
)
def test_a_copy_of_an_earlier_config_is_answered_with_file_and_line(overlay, said, tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "over.yaml").write_text(overlay)
    assert said in mistake(monkeypatch, capsys, "fit", "-c", tiny.config, "-c", "over.yaml")
