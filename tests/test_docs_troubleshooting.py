"""docs/troubleshooting.md quotes what the source says: each heading is a message, with `…` for what is put in."""

import ast
import re

import pytest

from tests.command.process import REPOSITORY

PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^### `(.*)`$", PAGE, re.M)


def said(node: ast.AST) -> str | None:
    """A text of the source with `…` for what is put in, and without backquotes, which would end a heading's code."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("`", "")
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values).replace("`", "")
    return None


def all_said() -> set[str]:
    files = (REPOSITORY / "lora_lightning").rglob("*.py")
    texts = {said(node) for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))}
    return {re.sub("…+", "…", text) for text in texts if text}


SAID = all_said()


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_error_is_in_the_source(quoted):
    assert any(quoted in text for text in SAID), quoted


def test_there_are_many_and_each_once():
    assert len(QUOTED) > 35
    assert len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quote_is_long_enough_to_be_found(quoted):
    assert len(re.sub(r"[…'.,: ()]", "", quoted)) >= 7, quoted
