"""The files around the package tell the truth about it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_targets_that_exist_on_the_pythons_that_are_promised(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow[True]  # YAML 1.1 reads the key `on` so
    targets = set(re.findall(r"^([a-z.][\w./-]*):", MAKEFILE, flags=re.MULTILINE))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    called = {name for step in steps for name in re.findall(r"\bmake ([\w./-]+)", step.get("run", ""))}
    assert called <= targets
    if "test" not in workflow["jobs"]:
        return  # the nightly one, on the oldest alone
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    promised = [line.rpartition(" :: ")[2] for line in PROJECT["classifiers"] if " :: 3." in line]
    assert tested == promised
    assert PROJECT["requires-python"] == f">={tested[0]}"
    assert f"Python {tested[0]} to {tested[-1]}" in MAKEFILE


def test_the_citation_is_of_this_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    found = [citation[name] for name in ("title", "version", "license")]
    assert found == [PROJECT[name] for name in ("name", "version", "license")]


def test_each_room_and_target_that_contributing_names_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rooms = re.findall(r"`((?:lora_lightning/)?[a-z_]+/|tests/[\w/]+\.py)`", text)
    rooms = [room if (ROOT / room).exists() else f"lora_lightning/{room}" for room in rooms]
    assert len(rooms) > 8
    assert [room for room in rooms if not (ROOT / room).exists()] == []
    for target in re.findall(r"make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE), target


def test_each_dependency_has_a_lower_bound_and_none_is_pinned():
    listed = [*PROJECT["dependencies"], *(d for extra in PROJECT["optional-dependencies"].values() for d in extra)]
    for dependency in listed:
        assert "==" not in dependency, dependency
        own = dependency.startswith(("lora_lightning[", "types-"))
        assert own or ">=" in dependency, dependency
