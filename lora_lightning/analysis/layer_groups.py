"""Where in a model a layer is: what it does, and in which block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Place(NamedTuple):
    """Of one layer."""

    group: str
    """What it does: its name without numbers, less what all numbered layers begin with."""
    block: str
    """The numbers in its name, `3` or `0.11`; empty where there is none."""


def places(names: Iterable[str]) -> dict[str, Place]:
    """By name; layers that do the same in each block have one group."""
    bare = {name: [part for part in name.split(".") if not part.isdigit()] for name in names}
    blocks = {name: ".".join(part for part in name.split(".") if part.isdigit()) for name in bare}
    shared = _common([parts[:-1] for name, parts in bare.items() if blocks[name]])
    cut = {name: parts[shared if blocks[name] else 0 :] for name, parts in bare.items()}
    return {name: Place(".".join(parts) or "layers", blocks[name]) for name, parts in cut.items()}


def _common(lists: list[list[str]]) -> int:
    """How many parts at the front all have."""
    count = 0
    for parts in zip(*lists, strict=False):
        if len(set(parts)) > 1:
            break
        count += 1
    return count
