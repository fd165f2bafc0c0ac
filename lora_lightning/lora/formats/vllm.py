"""An adapter as vLLM reads it: one rank and one `lora_alpha / r` for all modules, and only A and B of linear layers.

vLLM ignores `rank_pattern` and `alpha_pattern` (its `vllm/lora/peft_helper.py` and `lora_model.py`). So A gets rows and
B columns of zeros up to the largest rank, which changes nothing, and B takes the quotient of the two scales.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch import nn

from lora_lightning.lora.errors import AdapterError, first_few, warn
from lora_lightning.lora.formats.peft.layout import LayerLayout
from lora_lightning.lora.frozen.tensors import named_modules
from lora_lightning.lora.inject import grafted_modules
from lora_lightning.lora.layers import LoRALinear, SavedCopy, TokenRows, TrainedBias, kind_of

MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's `--max-lora-rank`."""
DEFAULT_MAX_RANK = 16


def fold_for_vllm(model: nn.Module, layouts: list[LayerLayout]) -> list[LayerLayout]:
    """`layouts` with one rank R and one scale S for all: `S B' A' = s B A` with A' = [A; 0], B' = [s / S B, 0].

    S is the most common scale that is a whole number over R, else 1. B' equals B where s is S, is exact where s / S is
    a power of two, and is rounded once elsewhere.

    Raises:
        AdapterError: vLLM cannot serve the adapter; the error lists the reasons.
    """
    if without := [f"{what}: {first_few(names)}" for what, names in _without_form(model, layouts).items() if names]:
        raise AdapterError(
            f"vLLM takes A and B of linear layers alone and has no form for {'; '.join(without)}:"
            " serve the merged model"
        )
    if not layouts:
        raise AdapterError("nothing to serve: this model has no adapted layer")
    rank = max(layout.rank for layout in layouts)
    allowed = next((limit for limit in MAX_RANKS if limit >= rank), None)
    if allowed is None:
        raise AdapterError(
            f"vLLM serves ranks up to {MAX_RANKS[-1]} and this adapter's is {rank} (with the parts of fused layers and"
            f" subtracted inits counted): serve the merged model"
        )
    if allowed > DEFAULT_MAX_RANK:
        warn(f"rank {rank}: start vLLM with --max-lora-rank {allowed} (its default is {DEFAULT_MAX_RANK})")
    counts = Counter(layout.scale for layout in layouts)
    whole = [s for s in counts if round(s * rank) and round(s * rank) / rank == s]  # lora_alpha is a whole number there
    scale = min(whole, key=lambda s: (-counts[s], s), default=1.0)
    return [replace(layout, rank=rank, scale=scale, rslora=False, one_alpha=round(scale * rank)) for layout in layouts]


def vllm_targets(model: nn.Module, layouts: list[LayerLayout]) -> list[str]:
    """The ends of the modules' names, which vLLM compares, or full names; an AdapterError if neither can do."""
    names = {layout.peft_name for layout in layouts}
    others = [n for n, module in named_modules(model, remove_duplicate=False) if n not in names and kind_of(module)]
    ends = {name.rpartition(".")[2] for name in names}
    if not any(other.rpartition(".")[2] in ends for other in others):
        return sorted(ends)
    for other in others:
        if twin := next((name for name in names if other.endswith(f".{name}")), None):
            raise AdapterError(
                f"'{twin}' is adapted and '{other}', whose name ends in it, is not: no list tells them apart"
            )
    return sorted(names)


def _without_form(model: nn.Module, layouts: list[LayerLayout]) -> dict[str, list[str]]:
    """What vLLM cannot serve, with the names of the modules that have it."""
    reasons: dict[str, list[str]] = {
        "DoRA": [one.name for one in layouts if one.layer.lora_settings.use_dora],
        "a bias on B (lora_bias)": [one.name for one in layouts if one.layer.lora_settings.lora_bias],
        "modules trained in full (modules_to_save)": [name for name, _ in grafted_modules(model, SavedCopy)],
        "trained token rows": [name for name, _ in grafted_modules(model, TokenRows)],
        "trained biases": [name for name, _ in grafted_modules(model, TrainedBias)],
    }
    for one in sorted(layouts, key=lambda one: one.layer.kind):
        if not isinstance(one.layer, LoRALinear):
            reasons.setdefault(f"an adapter on {one.layer.kind}", []).append(one.name)
        elif one.name != one.peft_name:
            reasons.setdefault("an adapter in nn.MultiheadAttention", []).append(one.name)
    return reasons
