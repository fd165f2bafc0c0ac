"""How the options stand in a PEFT directory: starts, biases and dropouts, out and in."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.adapter import adapter_tensors
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.lora.peft_config import holder


def exported_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`adapter_tensors`, with each start written into the factors: [A; A0] and [B, -B0], of twice the rank."""
    tensors = dict(adapter_tensors(model))
    for name, layer in adapted_layers(model):
        own = layer.lora_tensors()
        if "lora_A0" in own:
            tensors[f"{name}.lora_A"] = torch.cat([own["lora_A"], own["lora_A0"]])
            tensors[f"{name}.lora_B"] = torch.cat([own["lora_B"], -own["lora_B0"]], dim=1)
            del tensors[f"{name}.lora_A0"], tensors[f"{name}.lora_B0"]
    return tensors


def exported_ranks(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each layer as exported: with a start twice the rank, and the alpha that leaves the scale."""
    rslora = uses_rslora(model)
    ranks = {}
    for name, layer in adapted_layers(model):
        r, alpha = layer.lora_settings.r, layer.lora_settings.alpha
        started = "lora_A0" in layer.lora_tensors()
        ranks[name] = (2 * r, alpha * (math.sqrt(2) if rslora else 2)) if started else (r, alpha)
    return ranks


def uses_rslora(model: nn.Module) -> bool:
    """At r = 1 the two scales are one."""
    settings = [layer.lora_settings for _, layer in adapted_layers(model)]
    return any(s.scale != s.alpha / s.r for s in settings)


def common_dropout(model: nn.Module) -> float:
    """The dropout of most layers, for PEFT's config, which holds one."""
    counts = Counter(layer.lora_settings.dropout for _, layer in adapted_layers(model))
    return max(counts, key=lambda p: (counts[p], p)) if counts else 0.0


def other_dropouts(model: nn.Module) -> dict[str, float]:
    """By module, the dropouts that differ from `common_dropout`; they go into the metadata."""
    common = common_dropout(model)
    return {n: m.lora_settings.dropout for n, m in adapted_layers(model) if m.lora_settings.dropout != common}


def first_factors(model: nn.Module) -> dict[str, Tensor]:
    """A0 and B0 by their keys: no file holds them."""
    layers = adapted_layers(model)
    return {f"{n}.{o}": t for n, m in layers for o, t in m.lora_tensors().items() if o in ("lora_A0", "lora_B0")}


def start_in_file(peft: dict[str, Any]) -> str:
    """The start whose B0 A0 the file's factors count on, `gaussian` where there is none.

    PEFT takes s B0 A0 out of W0 for some starts and writes A and B as they are; pissa and olora follow from W0 alone.
    """
    init = peft.get("init_lora_weights", True)
    if init in ("pissa", "olora"):
        return str(init)
    if isinstance(init, str) and init not in ("gaussian", "eva", "orthogonal", "mica"):
        raise AdapterError(
            f"the adapter's config has init_lora_weights '{init}', which changed the base that it belongs to in a way"
            f" that cannot be computed again: save it in PEFT with path_initial_model_for_weight_conversion first"
        )
    return "gaussian"


def is_trained_bias(name: str, peft: dict[str, Any]) -> bool:
    """A bias that `bias` trained, and not one of a module that is saved in full."""
    wanted = {"all": (".bias",), "lora_only": (".base_layer.bias",)}.get(str(peft.get("bias")), ())
    return name.endswith(wanted) and holder(name, peft.get("modules_to_save") or []) is None


def is_peft_copy(key: str) -> bool:
    """PEFT's `bias: all` writes the biases inside a wrapped module a second time, under names of its own."""
    return ".original_module." in key or ".modules_to_save." in key
