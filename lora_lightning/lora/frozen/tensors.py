"""A model's tensors by their names in the plain model: which are the adapter's, and which are W0.

A wrapper inside a model, such as a block that `torch.compile` or `DataParallel` returned, puts a part of its own into
every name below it: `layers.0._orig_mod.weight`. Files, patterns and fingerprints go by the names without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.layers.class_swap import Grafted
from lora_lightning.lora.layers.trained.module_copy import SavedCopy

# By the class's name, since importing torch._dynamo takes seconds.
_WRAPPED_CHILD = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": "_checkpoint_wrapped_module",
}


_FOUND: dict[type[nn.Module], str | None] = {}


def _wrapped_child(cls: type[nn.Module]) -> str | None:
    """Under which name a wrapper holds what it wraps; None for any other class."""
    if cls not in _FOUND:
        children = (_WRAPPED_CHILD.get(f"{base.__module__}.{base.__qualname__}") for base in cls.__mro__)
        _FOUND[cls] = next((child for child in children if child), None)
    return _FOUND[cls]


def plain_name(model: nn.Module, name: str) -> str:
    """The name of a module or tensor as the model without wrappers has it: without `_orig_mod.` or `module.`.

    Only the parts that a wrapper added are left out: a module that its author called `module` keeps its name.
    """
    kept: list[str] = []
    module: nn.Module | None = model
    for part in name.split(".") if name else ():
        while module is not None and (child := _wrapped_child(type(module))):
            module = module._modules[child]
            if part == child:
                break
        else:
            kept.append(part)
            module = None if module is None else module._modules.get(part)
    return ".".join(kept)


def named_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """As the model's own `named_modules`, by plain names and without the wrappers."""
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if _wrapped_child(type(module)) is None:
            yield plain_name(model, name), module


def get_module(model: nn.Module, name: str) -> nn.Module:
    """The module of that plain name, past wrappers; raises an AttributeError where there is none."""
    module = _unwrap(model)
    for part in name.split(".") if name else ():
        module = _unwrap(module.get_submodule(part))
    return module


def _unwrap(module: nn.Module) -> nn.Module:
    while child := _wrapped_child(type(module)):
        module = module.get_submodule(child)
    return module


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict by plain names, with the tensors themselves."""
    return {plain_name(model, key): tensor for key, tensor in model.state_dict(keep_vars=True).items()}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A, B, what options add, token rows and the copies of `modules_to_save`, by their names in the plain model.

    Raises:
        AdapterError: the model's state dict lacks one of them.
    """
    state = plain_state(model)
    grafted = [(name, module) for name, module in named_modules(model) if isinstance(module, Grafted)]
    factors = {full_name(name, attribute) for name, module in grafted for attribute in module.lora_tensors()}
    copies = tuple(full_name(name, "lora_copy.") for name, module in grafted if isinstance(module, SavedCopy))
    if hidden := sorted(factors - state.keys()):
        raise AdapterError(f"'{hidden[0]}' is not in the model's state_dict: a wrapper inside renames its keys")
    return {key: tensor for key, tensor in state.items() if key in factors or key.startswith(copies)}


def adapter_bytes(model: nn.Module) -> int:
    """What the adapter's tensors take; its file is a few kilobytes larger."""
    return sum(tensor.numel() * tensor.element_size() for tensor in adapter_tensors(model).values())


def frozen_keys(model: nn.Module) -> set[str]:
    """Names in the plain model's state dict of all that is the backbone's own: all but the adapter's."""
    return set(plain_state(model)) - _adapter_keys(model)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """W0: the backbone's own tensors by plain names, less those that `modules_to_save` stands in for."""
    # Under every name that a module in two places has.
    everywhere = named_modules(model, remove_duplicate=False)
    replaced = tuple(f"{name}." for name, module in everywhere if isinstance(module, SavedCopy))
    ours, state = _adapter_keys(model), plain_state(model)
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and k not in ours and not k.startswith(replaced)}


class BaseTensor(NamedTuple):
    """One of W0's tensors, where a module holds it."""

    name: str
    """In the plain model."""
    module: nn.Module
    own: str
    """Its name in the module."""
    tensor: Tensor

    @property
    def is_parameter(self) -> bool:
        """False for a buffer."""
        return self.own in self.module._parameters


def iter_base(model: nn.Module) -> Iterator[BaseTensor]:
    """W0 in its places: parameters, and those buffers that a state dict holds; a tied one in each of its places.

    The adapter is left out; the originals that `modules_to_save` stands in for are not. `base_tensors` is W0 as a state
    dict holds it: there a quantized layer adds its scales, and whatever else its class writes.
    """
    copies: tuple[str, ...] = ()
    for path, module in named_modules(model):
        if path.startswith(copies):
            continue
        ours: tuple[str, ...] = ()
        if isinstance(module, Grafted):
            ours = module.lora_all_names
            copies += (full_name(path, "lora_copy"),) if isinstance(module, SavedCopy) else ()
        saved = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for attribute, tensor in (*module._parameters.items(), *saved.items()):
            if tensor is not None and attribute not in ours:
                yield BaseTensor(full_name(path, attribute), module, attribute, tensor)


def _adapter_keys(model: nn.Module) -> set[str]:
    """Like the keys of `adapter_tensors`, but under every name that a module in two places has."""
    ours = {id(tensor) for tensor in adapter_tensors(model).values()}
    return {key for key, tensor in plain_state(model).items() if id(tensor) in ours}


def full_name(*parts: str) -> str:
    """A name in a model from its parts, of which the model's own is empty."""
    return ".".join(part for part in parts if part)
