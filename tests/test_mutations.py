"""The table of mutations holds: each is of a text that is there, names tests that are there, and is caught."""

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.command.process import REPOSITORY
from tests.mutations import MUTATIONS, ROOT


def names_in(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.guard)
def test_a_mutation_is_of_a_text_that_is_there_once_and_names_tests_that_are_there(mutation):
    assert mutation.source.read_text().count(mutation.old) == 1
    assert mutation.new != mutation.old
    ast.parse(mutation.source.read_text().replace(mutation.old, mutation.new))
    assert mutation.tests
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in names_in(ROOT / file), test


def test_guards_have_names_of_their_own_and_every_law_has_one():
    assert Counter(m.guard for m in MUTATIONS).most_common(1)[0][1] == 1
    assert {m.guard.partition(":")[0] for m in MUTATIONS} >= {f"law {n}" for n in (2, 4, 5, 7, 8, 9, 10)}


@pytest.mark.slow
def test_every_mutation_is_caught():
    """In a process of its own, which forks: nothing may have been computed there before."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.mutations"]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout
