"""Layers that cannot take the rank or the bias asked for: all of them in one error, with lines to copy."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.layers import AdaptedLayer, LayerSettings
from lora_lightning.lora.targets.layer_settings import Wanted
from lora_lightning.lora.targets.patterns import matches

Resolved = list[tuple[Wanted, type[AdaptedLayer], LayerSettings]]


def refuse_ranks(resolved: Resolved) -> None:
    """Raise a TargetError where r is above the smaller side of a weight."""
    largest = {w.names[0]: kind.largest_rank(w.module, settings) for w, kind, settings in resolved}
    narrow = [(w.names[0], settings.r) for w, _, settings in resolved if settings.r > largest[w.names[0]]]
    if not narrow:
        return
    name, r = narrow[0]
    ends = _ends([name for name, _ in narrow], largest)
    # Keys of rank_pattern are regular expressions.
    ranks = {".".join(map(re.escape, e.split("."))): min(largest[n] for n in names) for e, names in ends.items()}
    raise TargetError(
        f"r={r} is larger than the layer '{name}' allows ({largest[name]}, the smaller side of its weight)"
        f"{_and_more(len(narrow))}: lower r, or add rank_pattern={json.dumps(ranks)}, or add"
        f" exclude_modules={json.dumps(list(ends))}"
    )


def refuse_lost_biases(resolved: Resolved) -> None:
    """Raise a TargetError where B's bias would have no bias to be merged into."""
    biasless = [w.names[0] for w, _, s in resolved if s.lora_bias and w.module._parameters.get("bias") is None]
    if biasless:
        ends = _ends(biasless, [w.names[0] for w, _, _ in resolved])
        raise TargetError(
            f"lora_bias: '{biasless[0]}' has no bias for a merge to add B's to{_and_more(len(biasless))}: add"
            f" exclude_modules={json.dumps(list(ends))}, or set lora_bias=False"
        )


def _and_more(count: int) -> str:
    return f", nor do {count - 1} more" if count > 1 else ""


def _ends(names: list[str], selected: Iterable[str]) -> dict[str, list[str]]:
    """The shortest ends of names that select `names` and nothing else of what is selected, with what each selects."""
    others = set(selected) - set(names)
    ends: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        tails = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
        fitting = [tail for tail in tails if not any(matches([tail], other) for other in others)]
        ends.setdefault(fitting[0] if fitting else name, []).append(name)
    return ends
