"""The table of mutations holds: each is of a text that is there, names tests that are there, and is caught."""

import ast
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from tests.command.process import REPOSITORY
from tests.mutations import MUTATIONS, ROOT


def names_in(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.guard)
def test_a_mutation_is_of_a_text_that_is_there_once_and_names_tests_that_are_there(mutation):
    assert mutation.source.count(mutation.old) == 1
    changed = mutation.source.replace(mutation.old, mutation.new)
    assert changed != mutation.source
    ast.parse(textwrap.dedent(changed))
    assert mutation.tests
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in names_in(ROOT / file), test


def test_a_mutation_changes_the_function_wherever_it_was_imported():
    """Of a method that calls `super()`, and of a plain function, seen through a name that was imported earlier."""
    program = """
from lora_lightning.training.checkpoints.file_io import check_whole as earlier
from tests.mutations import MUTATIONS
by = {m.guard: m for m in MUTATIONS}
for guard in ("files: by their own sums", "on by default"):
    before = by[guard].function.__code__
    by[guard].apply()
    assert by[guard].function.__code__ is not before
assert earlier is by["files: by their own sums"].function
assert earlier.__code__.co_consts != before.co_consts
"""
    subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=True
    )


def test_guards_have_names_of_their_own():
    assert Counter(m.guard for m in MUTATIONS).most_common(1)[0][1] == 1
    laws = {m.guard.partition(":")[0] for m in MUTATIONS if m.guard.startswith("law")}
    assert laws >= {f"law {n}" for n in (2, 4, 5, 7, 8, 9, 10)}


@pytest.mark.slow
def test_every_mutation_is_caught():
    """In a process of its own, which forks: nothing may have been computed there before."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.mutations"]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout
