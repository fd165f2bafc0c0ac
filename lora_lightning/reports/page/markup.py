"""HTML and SVG out of nested calls, in which text is escaped because nothing else can be written."""

from __future__ import annotations

import html
import re

# What neither HTML nor XML allows in text.
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def escaped(text: str) -> Markup:
    """Text as markup; a `Markup` stays what it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)))


def joined(*parts: str) -> Markup:
    """Parts after one another, each a `Markup`, or text that is escaped here."""
    return Markup("".join(map(escaped, parts)))


def tag(name: str, /, *children: str, **attributes: object) -> Markup:
    """`<name attributes>children</name>`.

    Args:
        children: as in `joined`.
        attributes: those that are None are left out. `class_` is `class`, `data_x` is `data-x`.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    told = "".join(f' {key}="{escaped(str(value))}"' for key, value in given.items())
    return Markup(f"<{name}{told}/>" if name in ("meta", "br") else f"<{name}{told}>{joined(*children)}</{name}>")
