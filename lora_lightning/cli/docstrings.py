"""Docstrings are parsed once: jsonargparse reads those of one class again for each option and each value of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import docstring_parser

_ONCE = functools.cache(docstring_parser.parse_from_object)


@contextmanager
def read_once() -> Iterator[None]:
    """Within the block; what has been parsed is kept for the next one."""
    before = docstring_parser.parse_from_object
    docstring_parser.parse_from_object = _ONCE
    try:
        yield
    finally:
        docstring_parser.parse_from_object = before
