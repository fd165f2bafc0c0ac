"""Parts of PEFT's keys that are PEFT's own wrappers and no modules of the model, whatever its modules are called."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from lora_lightning.lora.formats.peft.config import holder

WRAPPER = "base_layer"
COPIES = ("original_module", "modules_to_save")


def unwrapped(path: str, modules: Container[str]) -> tuple[str, int]:
    """`path` by the model's names, and how many wrappers it went through.

    A part `base_layer` is a wrapper unless the model has a module of that name there: `layer.base_layers.0` and timm's
    `base_layer.0` are modules, and `base_layer.0.base_layer` is one of them, wrapped.
    """
    plain, depth = "", 0
    for part in path.split("."):
        longer = f"{plain}.{part}" if plain else part
        if part == WRAPPER and longer not in modules:
            depth += 1
        else:
            plain = longer
    return plain, depth


def is_trained_bias(name: str, peft: dict[str, Any], modules: Container[str]) -> bool:
    """A bias that `bias` trained, and not one of a module that is saved in full."""
    plain, depth = unwrapped(name, modules)
    wanted = {"all": True, "lora_only": depth > 0}.get(str(peft.get("bias")), False)
    return wanted and f".{plain}".endswith(".bias") and holder(plain, peft.get("modules_to_save") or []) is None


def is_peft_copy(name: str, modules: Container[str]) -> bool:
    """PEFT's `bias: all` writes the biases inside a wrapped module a second time, under names of its own."""
    parts = unwrapped(name, modules)[0].split(".")
    return any(part in COPIES and ".".join(parts[: at + 1]) not in modules for at, part in enumerate(parts[:-1]) if at)
