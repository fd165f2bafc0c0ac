"""The table of mutations holds: each is of a text that is there, names tests that are there, and is caught."""

import ast
import os
import subprocess
import sys
import textwrap

import pytest

from tests.command.process import REPOSITORY
from tests.mutations import MUTATIONS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.guard)
def test_a_mutation_is_of_a_text_that_is_there_once_and_names_tests_that_are_there(mutation):
    assert mutation.source.count(mutation.old) == 1
    changed = mutation.source.replace(mutation.old, mutation.new)
    assert changed != mutation.source
    ast.parse(textwrap.dedent(changed))
    assert mutation.tests
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert f"\ndef {name.partition('[')[0]}(" in (REPOSITORY / file).read_text(), test


def test_the_table_has_all_its_mutations_each_once():
    assert len({mutation.guard for mutation in MUTATIONS}) == len(MUTATIONS) >= 50
    laws = {mutation.guard.partition(":")[0] for mutation in MUTATIONS}
    assert laws >= {f"law {n}" for n in (2, 4, 5, 7, 8, 9, 10)}


@pytest.mark.slow
def test_every_mutation_is_caught():
    """In a process of its own, which forks: nothing may have been computed there before."""
    env, command = {**os.environ, "PYTHONPATH": str(REPOSITORY)}, [sys.executable, "-m", "tests.mutations"]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout
