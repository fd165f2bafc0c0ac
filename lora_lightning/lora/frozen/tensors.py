"""The adapter as data: which tensors of a model are the adapter's, and which are the backbone's."""

from __future__ import annotations

from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.inject import grafted_modules, saved_copies
from lora_lightning.lora.layers import SavedCopy


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A, B, what options add, token rows and the copies of `modules_to_save`, by their keys in `model.state_dict()`.

    Raises:
        AdapterError: A or B is not found there under its module's name.
    """
    state = model.state_dict(keep_vars=True)
    wanted = [f"{name}." for name in _copy_prefixes(model)]
    factors = {joined(name, own) for name, module in grafted_modules(model) for own in module.lora_tensors()}
    if hidden := sorted(factors - state.keys()):
        raise AdapterError(f"'{hidden[0]}' is not in the model's state_dict: a wrapper inside renames its keys")
    return {k: v for k, v in state.items() if k in factors or any(k.startswith(prefix) for prefix in wanted)}


def adapter_bytes(model: nn.Module) -> int:
    """What the adapter's tensors take; its file is a few kilobytes larger."""
    return sum(tensor.numel() * tensor.element_size() for tensor in adapter_tensors(model).values())


def frozen_keys(model: nn.Module) -> set[str]:
    """Keys of `model.state_dict()` that are the backbone's own: all but the adapter's."""
    return set(model.state_dict(keep_vars=True)) - _adapter_keys(model)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """W0: the backbone's own tensors by name, less those that `modules_to_save` stands in for."""
    state = model.state_dict(keep_vars=True)
    # Under every name that a module in two places has.
    everywhere = model.named_modules(remove_duplicate=False)
    replaced = tuple(f"{name}." for name, module in everywhere if isinstance(module, SavedCopy))
    ours = _adapter_keys(model)
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and k not in ours and not k.startswith(replaced)}


def _adapter_keys(model: nn.Module) -> set[str]:
    """Like the keys of `adapter_tensors`, but under every name that a module in two places has."""
    keys: set[str] = set()
    ours = {id(t) for t in adapter_tensors(model).values()}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in ours:
            keys.add(key)
    return keys


def _copy_prefixes(model: nn.Module) -> list[str]:
    return [joined(name, "lora_copy") for name, _ in saved_copies(model)]


def joined(*parts: str) -> str:
    """A name in a model from its parts, of which the model's own is empty."""
    return ".".join(part for part in parts if part)
