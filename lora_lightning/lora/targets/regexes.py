"""Regular expressions that came with a file: refused where they cannot be read, or could take for ever to match.

`re` tries one way after another. A repeat inside a repeat, `(a+)+`, has exponentially many ways to miss; k repeats one
after another have about n^k on a name of n characters. Both are bounded here before the first match.
"""

from __future__ import annotations

import math
import re
from re import _parser  # type: ignore[attr-defined]  # as `re` itself reads a pattern; sre_parse before Python 3.11
from typing import Any

LENGTH = 100_000
"""Characters. Module names of the largest models, joined, stay below."""
LOOPS = 4
"""Unbounded repeats one after another: unsloth's patterns have four."""
CHOICES = 10**6
"""Ways through alternatives and optional parts."""

_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
_MANY = 16


def refusal(pattern: str) -> str | None:
    """Why not to match with `pattern`, None where it is safe. Flags for the whole, `(?i)`, cannot be embedded."""
    if len(pattern) > LENGTH:
        return f"has {len(pattern)} characters, more than {LENGTH}"
    try:
        # As PEFT embeds the keys of its patterns; what is whole alone, `a)|(b`, need not be whole in there.
        re.compile(pattern)
        re.compile(rf"(.*\.)?({pattern})$")
        loops, choices = _cost(_parser.parse(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression ({str(error)[:80]})"
    if loops > LOOPS or choices > CHOICES:
        return "could take for ever to match: it has repeats inside repeats, or too many one after another"
    return None


def _cost(parsed: Any) -> tuple[float, float]:
    """Unbounded repeats one after another, and ways through all else, of a parsed sequence."""
    loops, choices = 0.0, 1.0
    for name, content in ((str(op), content) for op, content in parsed):
        more, ways = _cost_of(name, content)
        loops, choices = loops + more, min(choices * ways, math.inf)
    return loops, choices


def _cost_of(name: str, content: Any) -> tuple[float, float]:
    if name in _REPEATS:
        return _repeated(*content)
    if name == "BRANCH":
        costs = [_cost(branch) for branch in content[1]]
        return max(loops for loops, _ in costs), sum(choices for _, choices in costs)
    if name == "GROUPREF_EXISTS":
        costs = [_cost(branch) for branch in content[1:] if branch]
        return max((loops for loops, _ in costs), default=0), sum(choices for _, choices in costs)
    if name in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return _cost(content[-1])
    if name == "ATOMIC_GROUP":
        return _cost(content)
    return (1, 1) if name == "GROUPREF" else (0, 1)


def _repeated(low: int, high: int, body: Any) -> tuple[float, float]:
    loops, choices = _cost(body)
    if high > _MANY:
        return (1, 1) if (loops, choices) == (0, 1) else (math.inf, math.inf)
    return loops * high, (high - low + 1) * choices**high
