"""What transformers itself keeps wider than asked for when it loads a model in half precision."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn

from lora_lightning.lora.frozen.tensors import joined
from lora_lightning.lora.layers.class_swap import own_class
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a


def load_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Keys of the transformers models in `model` that `from_pretrained(dtype=dtype)` would give another dtype.

    A router's bias and the like, which an architecture names or makes as float32. So W0 has the same bits, and the same
    fingerprint, whether it was loaded in `dtype` or cast to it.
    """
    found: dict[str, torch.dtype] = {}
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not is_a(module, HF_MODEL) or path.startswith(inside):
            continue
        inside = (*inside, f"{path}." if path else "")
        found |= {joined(path, key): own for key, own in _exceptions(module, dtype).items()}
    return found


def _exceptions(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    patterns: set[str] = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        patterns |= set(model._keep_in_fp32_modules or ())
    made = {key: t.dtype for key, t in _empty(model, dtype).items() if t.is_floating_point() and t.dtype != dtype}
    if not patterns:
        return made
    wide = re.compile("|".join(pattern.replace("*", ".*") for pattern in sorted(patterns)))
    return made | {key: torch.float32 for key in model.state_dict() if wide.search(key)}


def _empty(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state of a model of that class and config as transformers makes it in `dtype`, without memory."""
    config = copy.deepcopy(model.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        config.__dict__.pop(name, None)
    try:
        with torch.device("meta"):
            empty: nn.Module = own_class(type(model))._from_config(config, dtype=dtype)  # type: ignore[attr-defined]
    except Exception:  # a class with another way of being made: then its config says nothing
        return {}
    return empty.state_dict()
