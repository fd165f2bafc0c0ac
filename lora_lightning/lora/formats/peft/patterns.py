"""`rank_pattern` and `alpha_pattern` of an adapter that PEFT trained.

In training PEFT takes the first entry that matches a module, in the order in which the user wrote them; its file holds
them in alphabetical order, and PEFT itself then takes the first of those. Ranks are seen in the tensors' shapes. Alphas
are seen nowhere: where entries of different values match one module, the file does not say which was in force.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_lightning.lora.errors import AdapterError, did_you_mean, some
from lora_lightning.lora.formats.peft.config import CONFIG


def matching(patterns: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """The entries that match, in the file's order: PEFT's rule is a regex on the name or on a dotted end of it."""
    return {key: value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)}


def check_rank(peft: Mapping[str, Any], name: str, peft_name: str, rank: int) -> None:
    """Raise an AdapterError unless some order of the config's entries gives `name` the rank of its tensors."""
    allowed = set(matching(peft.get("rank_pattern"), peft_name).values()) or {peft.get("r", 8)}
    if rank and rank not in allowed:  # a rank of 0 is refused with the config
        said = " or ".join(str(r) for r in sorted(allowed))
        raise AdapterError(
            f"'{name}': lora_A has a shape of rank {rank}, and {CONFIG} says {said}: its scale would be wrong;"
            f" the two files are not of one adapter, or one was edited"
        )


def trained_alphas(
    peft: Mapping[str, Any], names: Mapping[str, str], ranks: Mapping[str, int], chosen: Mapping[str, float]
) -> dict[str, float]:
    """alpha of every adapted module, by name.

    Args:
        names: what PEFT looks each one up by.
        ranks: of the tensors, to name the likelier entry in the error.
        chosen: the user's answer where the file does not say.

    Raises:
        AdapterError: entries of different values match one module and `chosen` does not have it, or has one too many.
    """
    hits = {name: matching(peft.get("alpha_pattern"), peft_name) for name, peft_name in names.items()}
    doubtful = {name: found for name, found in hits.items() if len({float(v) for v in found.values()}) > 1}
    for name in chosen:
        if name not in names:
            raise AdapterError(f"alphas: the adapter has no module '{name}'{did_you_mean(name, names)}")
        if name not in doubtful:
            raise AdapterError(f"alphas: {CONFIG} leaves no doubt about '{name}': leave it out")
    if unanswered := [name for name in doubtful if name not in chosen]:
        raise AdapterError(_in_doubt(peft, unanswered, doubtful, names, ranks))
    default = float(peft.get("lora_alpha", 8))
    return {
        name: float(chosen[name]) if name in chosen else float(next(iter(found.values()), default))
        for name, found in hits.items()
    }


def _in_doubt(
    peft: Mapping[str, Any],
    unanswered: list[str],
    doubtful: Mapping[str, dict[str, Any]],
    names: Mapping[str, str],
    ranks: Mapping[str, int],
) -> str:
    first = unanswered[0]
    entries = " and ".join(f"'{key}' ({value:g})" for key, value in doubtful[first].items())
    by_rank = [k for k, r in matching(peft.get("rank_pattern"), names[first]).items() if r == ranks[first]]
    likely = [key for key in by_rank if key in doubtful[first]]
    evidence = f"; in rank_pattern '{likely[0]}' won, by the tensors' rank" if len(likely) == 1 else ""
    return (
        f"alpha_pattern: {entries} match '{first}'{evidence}; PEFT trained with the one that was written first and"
        f" saves them in another order, so the file does not say which alpha counts: pass"
        f" alphas={{'{first}': ...}}; in doubt: {some(unanswered, 10)}"
    )
