"""The keys of PEFT's files: the name of each tensor, and the parts of a key that are PEFT's and no module's.

With `m` for `base_model.model.<module>`, r the rank, (out, in) the shape of W0:

    m.lora_A.weight            (r, in); of a convolution (r, in, *kernel)
    m.lora_B.weight            (out, r); of a convolution (out, r / groups, 1...)
    m.lora_B.bias              (out,), where `lora_bias` is set
    m.lora_embedding_A, _B     (r, V) and (width, r) of an embedding of V rows
    m.lora_magnitude_vector    (out,), or (1, out, 1...) of a convolution, where `use_dora` is set
    m.token_adapter.trainable_tokens_delta   (tokens, width): the trained rows themselves, in the config's order
    m.base_layer.bias          a trained bias of an adapted module; `m.bias` of any other
    m.<any other name>         a tensor of a module that `modules_to_save` lists

PEFT wraps an adapted module in one whose child `base_layer` is the original: an attention has its out_proj's factors at
`m.base_layer.out_proj`. Of several adapted parameters of one module, the last registered one has its factors at `m`,
the one before it at `m.base_layer`, and so on. A stack of E experts has A (r E, in) with the rows of an expert together
and B (out, r E) with column `rank * E + expert`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor

from lora_lightning.lora.errors import AdapterError, first_few

PREFIX = "base_model.model."
WRAPPER = "base_layer"
COPIES = ("original_module", "modules_to_save")
A_ENDS = (".lora_A.weight", ".lora_embedding_A")
OTHER_ENDS = (".lora_B.weight", ".lora_embedding_B", ".lora_B.bias", ".lora_magnitude_vector")
TOKENS_END = ".token_adapter.trainable_tokens_delta"

# The parts that compiling, sharding and checkpointing add to keys.
OTHER_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# A raw state dict of a PEFT model carries the adapter's name: `q_proj.lora_A.default.weight`.
NAMED = re.compile(r"\.(?:lora_(?:embedding_)?[AB]|lora_magnitude_vector)\.(?!(?:weight|bias)$)([^.]+)(?:\.\w+)?$")


def canonical_keys(tensors: Mapping[str, Tensor], modules: Container[str] = ()) -> dict[str, Tensor]:
    """The tensors by the keys that PEFT's `save_pretrained` writes; an AdapterError where they are of several adapters.

    The names of the model's `modules` tell a module named `base_model` from a model that was wrapped twice.
    """
    adapters = {match[1] for key in tensors if (match := NAMED.search(key))}
    if len(adapters) > 1:
        raise AdapterError(f"the file holds {len(adapters)} adapters ({first_few(sorted(adapters))}): save one of them")
    is_nested = bool(tensors) and all(k.startswith(PREFIX + PREFIX) for k in tensors) and "base_model" not in modules
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        plain = OTHER_WRAPPERS.sub("", key)
        plain = plain.removeprefix(PREFIX) if is_nested else plain
        for name in adapters:
            plain = re.sub(rf"\.(lora_\w+|trainable_tokens_delta)\.{re.escape(name)}(?=\.|$)", r".\1", plain)
            plain = plain.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
            plain = plain.replace(f".modules_to_save.{name}.", ".")
        if plain in renamed:
            raise AdapterError(f"the adapter has two tensors for '{plain}', one of them as '{key}'")
        renamed[plain] = tensor
    return renamed


def strip_wrappers(path: str, modules: Container[str]) -> tuple[str, int]:
    """`path` without PEFT's wrappers, and the number of wrappers.

    A part `base_layer` is a wrapper unless the model has a module of that name there: timm's `base_layer.0` is a
    module, and `base_layer.0.base_layer` is the same module, wrapped.
    """
    plain, depth = "", 0
    for part in path.split("."):
        longer = f"{plain}.{part}" if plain else part
        if part == WRAPPER and longer not in modules:
            depth += 1
        else:
            plain = longer
    return plain, depth


def is_peft_copy(name: str, modules: Container[str]) -> bool:
    """Whether a key is the second copy of a wrapped module's bias, which PEFT writes with `bias: all`."""
    parts = strip_wrappers(name, modules)[0].split(".")
    return any(part in COPIES and ".".join(parts[: at + 1]) not in modules for at, part in enumerate(parts[:-1]) if at)


def is_trained_bias(name: str, peft: Mapping[str, Any], modules: Container[str]) -> bool:
    """Whether a key is a bias that the config's `bias` trained, and not part of a module that is saved in full."""
    plain, depth = strip_wrappers(name, modules)
    wanted = {"all": True, "lora_only": depth > 0}.get(str(peft.get("bias")), False)
    return wanted and f".{plain}".endswith(".bias") and saved_module(plain, peft.get("modules_to_save") or []) is None


def saved_module(key: str, listed: list[str]) -> str | None:
    """The outermost module around `key` that PEFT saves in full: its name ends in an entry, even in mid-word."""
    parts = key.split(".")
    around = [".".join(parts[:i]) for i in range(1, len(parts))]
    return next((name for name in around if any(name.endswith(entry) for entry in listed)), None)


def copy_key(key: str) -> str:
    """PEFT's key without the prefix for a tensor of `modules_to_save`; any other key unchanged."""
    return f".{key}".replace(".lora_copy.", ".", 1)[1:]


def token_key(name: str) -> str:
    """PEFT's key without the prefix for the trained rows of the embedding `name`."""
    return f"{name}{TOKENS_END}".removeprefix(".")
