"""Where long names in code break: after a separator, as in `test_|a_|name`, `configs/|demo.|yaml`; else nowhere."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

LONG = re.compile(r'<span class="pre">([^<]{24,})</span>')
AFTER = re.compile(r"(?<=[_./=:,(@+])(?=[\w\"'{\[&])|(?<=\w-)(?=\w)")


def broken(word: re.Match[str]) -> str:
    """The word in pieces, each of which stays whole (`.pre` in site.css)."""
    pieces = AFTER.split(word[1])
    return "<wbr>".join(f'<span class="pre">{piece}</span>' for piece in pieces)


def in_page(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Sphinx writes each word of inline code into a `.pre` of its own."""
    if "body" in context:
        context["body"] = LONG.sub(broken, context["body"])


def setup(app: Sphinx) -> dict[str, Any]:
    """For each page that is written."""
    app.connect("html-page-context", in_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
