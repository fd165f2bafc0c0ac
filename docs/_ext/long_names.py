"""Where lines break in code and in tables.

Long names in code break after a separator, as in `test_|a_|name` and `configs/|demo.|yaml`, and nowhere else. What is
short does not break at all. A command that a phone wraps does not break at a hyphen, as in `--halving` and `1e-4`.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

LONG = re.compile(r'<span class="pre">([^<]{24,})</span>')
COMMANDS = re.compile(r'(?<=<div class="highlight-)(?:bash|sh) .*?</pre>', re.S)
HYPHENATED = re.compile(r"(?<!\S)(?=\S{3,36}(?!\S))\S*-\S*")
SHORT = 16
"""Characters of code, or of a table's cell, that stay on one line."""
AFTER = re.compile(r"(?<=[_./=:,(@+])(?=[\w\"'{\[&])|(?<=\w-)(?=\w)")


def broken(word: re.Match[str]) -> str:
    """The word in pieces, each of which stays whole (`.pre` in site.css)."""
    pieces = AFTER.split(word[1])
    return "<wbr>".join(f'<span class="pre">{piece}</span>' for piece in pieces)


def whole_words(block: re.Match[str]) -> str:
    """A block of commands whose words with a hyphen stay whole (`.whole` in site.css)."""
    pieces = re.split(r"(<[^>]+>)", block[0])
    return "".join(
        piece if piece.startswith("<") else HYPHENATED.sub(r'<span class="whole">\g<0></span>', piece)
        for piece in pieces
    )


def in_page(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Sphinx writes each word of inline code into a `.pre` of its own."""
    if "body" in context:
        context["body"] = COMMANDS.sub(whole_words, LONG.sub(broken, context["body"]))


def mark_short(app: Sphinx, doctree: nodes.document) -> None:
    """Give short code and short cells a class of their own, for site.css."""
    for node in (*doctree.findall(nodes.literal), *doctree.findall(nodes.entry)):
        if len(node.astext()) <= SHORT:
            node["classes"].append("short")


def setup(app: Sphinx) -> dict[str, Any]:
    """For each page that is written."""
    app.connect("doctree-read", mark_short)
    app.connect("html-page-context", in_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
