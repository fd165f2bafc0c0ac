"""The `adapter_config.json` that PEFT reads an adapter of ours by."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_lightning.lora.formats.peft.config import dotted_ends
from lora_lightning.lora.formats.peft.packing import Packed
from lora_lightning.lora.inject import grafted_modules
from lora_lightning.lora.layers import LoRAConv1D, LoRAParameter, SavedCopy, TokenRows, TrainedBias


def peft_config_of(model: nn.Module, packed: list[Packed]) -> dict[str, Any]:
    """Ranks, alphas and names written out in full, so that nothing depends on the order of patterns."""
    settings = [p.layer.lora_settings for p in packed]
    folded = any(p.one_alpha is not None for p in packed)
    rslora = not folded and any(s.scale != s.alpha / s.r for s in settings)  # at r = 1 the two scales are one
    parameters = [p.peft_name for p in packed if isinstance(p.layer, LoRAParameter)]
    ranks = {p.peft_name: p.rank for p in packed}
    alphas = {p.peft_name: p.alpha(rslora=rslora) for p in packed}
    return {
        "peft_type": "LORA",
        **ranks_and_alphas(ranks, alphas),
        "lora_dropout": common_dropout(packed),
        "target_modules": _selection([name for name in ranks if name not in parameters], model),
        "target_parameters": parameters or None,
        "trainable_token_indices": {n: m.lora_token_ids.tolist() for n, m in grafted_modules(model, TokenRows)} or None,
        "modules_to_save": [name for name, _ in grafted_modules(model, SavedCopy)] or None,
        "use_rslora": rslora,
        "init_lora_weights": True,
        "bias": _bias(model, packed),
        # PEFT refuses it beside bare parameters, and sets it for Conv1D by itself there.
        "fan_in_fan_out": any(isinstance(p.layer, LoRAConv1D) for p in packed) and not parameters,
        "use_dora": any(s.use_dora for s in settings),
        "lora_bias": any(s.lora_bias for s in settings),
        "inference_mode": True,
    }


def ranks_and_alphas(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Those of the first module as the config's own, and a pattern for each module that has others."""
    r, alpha = next(iter(ranks.values()), 8), next(iter(alphas.values()), 16)
    return {
        "r": r,
        "lora_alpha": _number(alpha),
        "rank_pattern": {f"^{re.escape(n)}$": rank for n, rank in ranks.items() if rank != r},
        "alpha_pattern": {f"^{re.escape(n)}$": _number(a) for n, a in alphas.items() if a != alpha},
    }


def _bias(model: nn.Module, packed: list[Packed]) -> str:
    biased = {module for _, module in grafted_modules(model, TrainedBias)}
    if not biased:
        return "none"
    return "lora_only" if biased <= {p.layer.lora_owner for p in packed} else "all"


def _selection(names: list[str], model: nn.Module) -> list[str] | str:
    """Full names; where one is also the dotted end of another module's name, one anchored regex instead."""
    chosen = set(names)
    everything = [name for name, _ in model.named_modules(remove_duplicate=False)]
    if any(other not in chosen and not chosen.isdisjoint(dotted_ends(other)) for other in everything):
        return _exactly(names)
    return sorted(names)


def _exactly(names: list[str]) -> str:
    return "|".join(re.escape(name) for name in names)


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def own_name(model: nn.Module) -> str | None:
    """The hub name or path that a transformers model carries."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    return name or None


def common_dropout(packed: list[Packed]) -> float:
    """The dropout of most layers, for PEFT's config, which holds one."""
    counts = Counter(p.layer.lora_settings.dropout for p in packed)
    return max(counts, key=lambda dropout: (counts[dropout], dropout)) if counts else 0.0


def other_dropouts(packed: list[Packed]) -> dict[str, float]:
    """By module, the dropouts that differ from `common_dropout`; they go into the metadata."""
    common, own = common_dropout(packed), {p.name: p.layer.lora_settings.dropout for p in packed}
    return {name: dropout for name, dropout in own.items() if dropout != common}
