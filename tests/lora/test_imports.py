"""The direction of imports: lora < tasks, data < training < cli; lora needs torch and safetensors only; and each
package that is imported is one that pyproject.toml asks for."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lora_lightning

ROOT = Path(lora_lightning.__file__).parent
STDLIB = sys.stdlib_module_names
# What each part of the package may import of the others.
BELOW: dict[str, set[str]] = {
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


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


@functools.cache
def imports(path: Path, *, lazy: bool = True) -> set[str]:
    """Full names of the modules that a file imports; `if TYPE_CHECKING` left out; without `lazy`, functions too."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else str(node.module))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def part_of(module: str) -> str:
    return [*module.split("."), ""][1]


def helpers() -> set[str]:
    """Files beside the parts that stand on lora and on each other only: open to every part but lora."""
    found = {path.stem: imports(path) for path in ROOT.glob("*.py") if path.stem != "__init__"}
    while bad := [
        stem
        for stem, modules in found.items()
        if {part_of(m) for m in modules if m.partition(".")[0] == "lora_lightning"} - {"lora", *found}
    ]:
        del found[bad[0]]
    return set(found)


HELPERS = helpers()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    part = part_of(module_of(path))
    for module in imports(path):
        top = module.partition(".")[0]
        if part == "lora":
            assert top in STDLIB | {"torch", "safetensors", "lora_lightning"}, module
        if top == "lora_lightning" and part in BELOW:
            allowed = BELOW[part] | (HELPERS if part != "lora" else set())
            assert part_of(module) in allowed, f"{part} imports {module}"


def asked_for(line: str) -> Iterator[str]:
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
    graph = {module_of(path): imports(path, lazy=False) & MODULES for path in FILES}
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for name in sorted(graph[module]):
                walk(name, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        walk(module, ())


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
