"""How an entry of a config selects names: lists, regular expressions, the longest pattern; and near misses."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

from lora_lightning.lora.errors import TargetError, did_you_mean, near_misses
from lora_lightning.lora.targets.fused_projections import SliceSpec

SEVERAL = re.compile(r"[\w.]+(?: *, *[\w.]+)+")
"""Names separated by commas, as other tools accept them."""

Value = TypeVar("Value", int, float, SliceSpec)


def matches(pattern: str | list[str], name: str) -> str | None:
    """The entry that selects `name`: a list's entry equals it or its dotted end, a string is a full-match regex."""
    if isinstance(pattern, str):
        return pattern if re.fullmatch(pattern, name) else None
    ends = set(dotted_ends(name))
    return next((entry for entry in pattern if entry in ends), None)


def dotted_ends(name: str) -> list[str]:
    """`c`, `b.c` and `a.b.c` of `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def matches_any(pattern: str | list[str], names: list[str]) -> list[str]:
    """The entries that match any of a module's names."""
    entries = [pattern] if isinstance(pattern, str) else [[entry] for entry in pattern]
    hits = (next((hit for name in names if name and (hit := matches(entry, name))), None) for entry in entries)
    return [hit for hit in hits if hit is not None]


def find_module(field_name: str, entry: str, names: dict[nn.Module, list[str]]) -> nn.Module:
    """The module with this name, or the one whose name ends in it; a TargetError where there is none or several."""
    exact = [m for m, group in names.items() if entry in group]
    hits = exact or [m for m, group in names.items() if any(matches([entry], name) for name in group)]
    if not hits:
        raise TargetError(no_match(field_name, entry, all_names(names.values())))
    if len(hits) > 1:
        several = ", ".join(f"'{names[m][0]}'" for m in hits[:4])
        raise TargetError(f"{field_name}: '{entry}' is the end of several names: write in full {several}")
    return hits[0]


def regex_refusal(pattern: str, *, is_end: bool = True) -> str | None:
    """Why `pattern` cannot be used as a regular expression, None where it can.

    Args:
        is_end: the pattern also selects by dotted ends, so that it must compile inside the group that PEFT and this
            package put around it; `a)|(b` and global flags such as `(?i)a` do not.
    """
    try:
        re.compile(pattern)
        if is_end:
            re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression ({str(error)[:80]})"
    return None


def all_names(names: Iterable[list[str]]) -> list[str]:
    """All names but the model's own, which is empty."""
    return [name for group in names for name in group if name]


def block_number(name: str) -> int | None:
    """The first number in a dotted name, as PEFT counts blocks: 3 in `model.layers.3.mlp.experts.0.up`."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def has_match(patterns: Iterable[str], names: list[str]) -> bool:
    """PEFT's rule for rank and alpha patterns: a regex on one of the whole names or on a dotted end of it."""
    return any(p == name or re.fullmatch(rf"(?:.*\.)?(?:{p})", name) for p in patterns for name in names)


def by_pattern(field_name: str, patterns: dict[str, Value], names: list[str], default: Value) -> Value:
    """The value of the longest pattern that matches, whatever the order of keys."""
    matching = {p: (p in names, len(p)) for p in patterns if has_match([p], names)}
    best = [p for p, length in matching.items() if length == max(matching.values())]
    if any(patterns[p] != patterns[best[0]] for p in best):
        raise TargetError(
            f"{field_name}: '{best[0]}' and '{best[1]}' both match '{names[0]}' with different values,"
            f" and neither is longer: write its full name"
        )
    return patterns[best[0]] if best else default


def refuse_unused(field_name: str, patterns: Iterable[str], selected: list[list[str]]) -> None:
    """Raise for a pattern that matches none of the selected names."""
    for pattern in patterns:
        if not any(has_match([pattern], group) for group in selected):
            raise TargetError(no_match(field_name, pattern, all_names(selected), what="adapted module"))


def no_match(field_name: str, entry: str, names: list[str], *, is_regex: bool = False, what: str = "module") -> str:
    """The error message for an entry that selects nothing, with near misses or some of the known names."""
    ends = {name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()}
    depth = entry.count(".") + 1
    alike = {".".join(name.split(".")[-depth:]) for name in names} if depth > 1 and not is_regex else set()
    close = did_you_mean(entry, alike) or did_you_mean(entry, ends) or did_you_mean(entry, names)
    if not close:
        known = near_misses("", ends) or sorted(ends)[:8]
        close = f"; there are {', '.join(known)}" if known else ""
    if is_regex and any(name.endswith(f".{entry}") for name in names):
        close = f"; a string is a regular expression on full names: for modules that end in it write [{entry}]"
    if is_regex and SEVERAL.fullmatch(entry):
        close = f"; a list of names is written [{entry}]"
    return f"{field_name}: no {what} matches '{entry}'{close}"
