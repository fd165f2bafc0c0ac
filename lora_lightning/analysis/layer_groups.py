"""The group (function) and the block of each layer, from its name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Place(NamedTuple):
    """One layer's group and block."""

    group: str
    """The layer's name without numbers and without the beginning that all numbered layers share."""
    block: str
    """The numbers in its name, `3` or `0.11`; empty where there is none."""


def places(names: Iterable[str]) -> dict[str, Place]:
    """The place of each layer, by name; layers with the same function in each block have one group."""
    bare = {name: [part for part in name.split(".") if not part.isdigit()] for name in names}
    blocks = {name: ".".join(part for part in name.split(".") if part.isdigit()) for name in bare}
    shared = _common([parts[:-1] for name, parts in bare.items() if blocks[name]])
    cut = {name: parts[shared if blocks[name] else 0 :] for name, parts in bare.items()}
    return {name: Place(".".join(parts) or "layers", blocks[name]) for name, parts in cut.items()}


def _common(lists: list[list[str]]) -> int:
    """The number of leading parts that all lists share."""
    count = 0
    for parts in zip(*lists, strict=False):
        if len(set(parts)) > 1:
            break
        count += 1
    return count
