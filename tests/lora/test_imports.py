"""The direction of imports: lora < tasks, data < training < cli; lora needs torch and safetensors only; and each
package that is imported is one that pyproject.toml asks for."""

import ast
import functools
import graphlib
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lora_lightning

ROOT = Path(lora_lightning.__file__).parent
STDLIB = sys.stdlib_module_names
# What each part of the package may import of the others.
BELOW = {
    "lora": {"lora"},
    "backbones": {"backbones", "lora"},
    "analysis": {"analysis", "reports", "tasks", "data", "lora"},
    "tasks": {"tasks", "data", "lora", "backbones"},
    "data": {"tasks", "data", "lora", "backbones"},
    "export": {"export", "tasks", "data", "lora", "backbones"},
    "reports": {"reports", "lora"},
    "training": {"export", "training", "tasks", "data", "lora", "backbones", "analysis", "reports"},
}
FILES = sorted(ROOT.rglob("*.py"))


def module_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module):
    return [*module.split("."), ""][1]


MODULES = {module_of(path) for path in FILES}


@functools.cache
def imports(path, *, lazy=True):
    """Full names of the modules that a file imports; `if TYPE_CHECKING` left out; without `lazy`, functions too."""
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(name if name in MODULES else node.module for name in full)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_imports_point_down():
    for path in FILES:
        part = part_of(module_of(path))
        for module in imports(path):
            top = module.partition(".")[0]
            if part == "lora":
                assert top in STDLIB | {"torch", "safetensors", "lora_lightning"}, f"{path} imports {module}"
            if top == "lora_lightning" and part in BELOW:
                assert part_of(module) in BELOW[part], f"{path} imports {module}"


def asked_for(line):
    """The package of a dependency, and those that the extras it names add to it."""
    wanted = Requirement(line)
    yield canonicalize_name(wanted.name)
    for extra in wanted.extras:
        for brought in map(Requirement, requires(wanted.name) or []):
            marker = brought.marker
            if marker and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
                yield canonicalize_name(brought.name)


def test_each_package_that_is_imported_is_declared():
    """What only comes with another one goes, or changes, when that one wants it no more."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    extras = [lines for name, lines in project["optional-dependencies"].items() if name not in ("dev", "docs")]
    declared = {name for line in sum(extras, project["dependencies"]) for name in asked_for(line)}
    owners = packages_distributions()
    for path in FILES:
        for top in {module.partition(".")[0] for module in imports(path)} - STDLIB - {"lora_lightning"}:
            owning = {canonicalize_name(owner) for owner in owners.get(top, [top])}
            assert owning & declared, f"{path} imports {top}, which no line of pyproject.toml asks for"


def test_no_file_imports_itself_in_a_circle():
    graphlib.TopologicalSorter({module_of(path): imports(path, lazy=False) & MODULES for path in FILES}).prepare()


def test_lora_runs_without_lightning_transformers_and_wandb():
    modules = sorted(m for m in MODULES if part_of(m) == "lora")
    assert len(modules) > 15
    names = ["LoRAConfig", "inject", "merge", "save_adapter", "load_adapter", "remove", "disabled", "LoRAError"]
    code = "\n".join([f"from lora_lightning import {', '.join(names)}", *(f"import {m}" for m in modules)])
    code += "\nimport sys; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT.parent)
    loaded = set(done.stdout.split())
    assert {"torch", "safetensors"} <= loaded
    assert not loaded & {"lightning", "pytorch_lightning", "transformers", "wandb", "peft", "datasets", "rich"}


def test_every_public_name_is_there_and_a_wrong_one_is_not():
    for name in lora_lightning.__all__:
        if part_of(lora_lightning._WHERE[name]) == "lora":
            assert getattr(lora_lightning, name).__name__ == name
    assert set(lora_lightning.__all__) <= set(dir(lora_lightning))
    with pytest.raises(AttributeError, match="nothing"):
        _ = lora_lightning.nothing
