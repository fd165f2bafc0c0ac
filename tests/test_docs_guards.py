"""docs/guards.md names tests that are there, and every guard that a mutation takes away is in its table."""

import ast
import re
from pathlib import Path

from tests.command.process import REPOSITORY
from tests.mutations import MUTATIONS

TEXT = (REPOSITORY / "docs" / "guards.md").read_text()
NAMED = set(re.findall(r"`(test_\w+)`", TEXT))
ELSEWHERE = {"law 8", "law 9", "loggers", "on by default"}
"""Their tests are of many guards at once, or in the prose."""


def all_tests() -> set[str]:
    files = Path(REPOSITORY / "tests").rglob("test_*.py")
    trees = [ast.parse(file.read_text()) for file in files]
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_page_names_is_there():
    assert len(NAMED) > 35
    assert all_tests() >= NAMED, sorted(NAMED - all_tests())


def test_every_row_has_five_cells_and_a_test():
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and "`test_" in line]
    assert len(rows) > 25
    assert all(row.count(" | ") == 4 for row in (re.sub(r"\|  *\|", "| - |", row) for row in rows))


def test_a_guard_with_a_mutation_is_on_the_page():
    for mutation in MUTATIONS:
        if mutation.guard.partition(":")[0] not in ELSEWHERE:
            names = {test.partition("::")[2].partition("[")[0] for test in mutation.tests}
            of_files = mutation.guard.startswith("files")
            assert names & NAMED or of_files, mutation.guard
