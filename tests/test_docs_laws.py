"""docs/laws.md: ten laws, each with tests that are there."""

import ast
import re

import pytest

from tests.command.process import REPOSITORY

PAGE = (REPOSITORY / "docs" / "laws.md").read_text(encoding="utf-8")
LAWS = re.findall(r"^## (\d+)\. (.*?)\n(.*?)(?=^## )", PAGE, re.S | re.M)


def test_there_are_ten():
    assert [int(number) for number, _, _ in LAWS] == list(range(1, 11))


@pytest.mark.parametrize(("number", "law", "text"), LAWS, ids=[law for _, law, _ in LAWS])
def test_the_tests_of_a_law_are_in_the_files_that_it_names(number, law, text):
    files = re.findall(r"^- \[(tests/\S+\.py)\]\(\.\./(\S+)\):\n((?:  `\w+`,?\n)+)", text, re.M)
    assert len(files) >= 2
    for shown, file, names in files:
        assert shown == file
        tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert set(re.findall(r"`(\w+)`", names)) <= there, file
    assert len(re.findall(r"`(test_\w+)`", text)) == sum(len(re.findall(r"`\w+`", names)) for *_, names in files)
