"""A model's tensors by their names in the plain model: which are the adapter's, and which are W0.

A wrapper inside a model, such as a block that `torch.compile` or `DataParallel` returned, adds a part to every name
below it: `layers.0._orig_mod.weight`. Files, patterns and fingerprints use the names without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError, did_you_mean, first_few
from lora_lightning.lora.layers.class_swap import Grafted
from lora_lightning.lora.layers.trained.module_copy import SavedCopy

# By the class's name, since importing torch._dynamo takes seconds.
_WRAPPED_CHILD = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": "_checkpoint_wrapped_module",
}


_CHILD_NAMES: dict[type[nn.Module], str | None] = {}


def _wrapped_child(cls: type[nn.Module]) -> str | None:
    """The name of a wrapper's wrapped child; None for any other class."""
    if cls not in _CHILD_NAMES:
        names = (f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)
        _CHILD_NAMES[cls] = next((_WRAPPED_CHILD[name] for name in names if name in _WRAPPED_CHILD), None)
    return _CHILD_NAMES[cls]


def plain_name(model: nn.Module, name: str) -> str:
    """The name of a module or tensor in the model without wrappers: without `_orig_mod.` or `module.`.

    Only the parts that a wrapper added are left out: a module that its author named `module` keeps its name.
    """
    parts: list[str] = []
    module: nn.Module | None = model
    for part in name.split(".") if name else ():
        while module is not None and (child := _wrapped_child(type(module))):
            module = module._modules[child]
            if part == child:
                break
        else:
            parts.append(part)
            module = None if module is None else module._modules.get(part)
    return ".".join(parts)


def named_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """As `model.named_modules`, by plain names and without the wrappers."""
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if _wrapped_child(type(module)) is None:
            yield plain_name(model, name), module


def get_module(model: nn.Module, name: str) -> nn.Module:
    """The module with this plain name, without wrappers; raises an AttributeError where there is none."""
    module = _unwrap(model)
    for part in name.split(".") if name else ():
        module = _unwrap(module.get_submodule(part))
    return module


def _unwrap(module: nn.Module) -> nn.Module:
    while child := _wrapped_child(type(module)):
        module = module.get_submodule(child)
    return module


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict by plain names, with its tensors and not detached copies."""
    return {plain_name(model, key): tensor for key, tensor in model.state_dict(keep_vars=True).items()}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A, B, options' tensors, token rows and trained copies by plain names; an AdapterError where one is lost."""
    state = plain_state(model)
    grafted = [(name, module) for name, module in named_modules(model) if isinstance(module, Grafted)]
    factors = {full_name(name, tensor) for name, module in grafted for tensor in module.lora_tensors()}
    copies = tuple(full_name(name, "lora_copy.") for name, module in grafted if isinstance(module, SavedCopy))
    if hidden := sorted(factors - state.keys()):
        raise AdapterError(f"'{hidden[0]}' is not in the model's state_dict: a wrapper inside renames its keys")
    return {key: tensor for key, tensor in state.items() if key in factors or key.startswith(copies)}


def adapter_bytes(model: nn.Module) -> int:
    """Bytes of the adapter's tensors; its file is a few kilobytes larger."""
    return sum(tensor.numel() * tensor.element_size() for tensor in adapter_tensors(model).values())


def frozen_keys(model: nn.Module) -> set[str]:
    """The plain names in the model's state dict of all tensors but the adapter's, with every name of a module."""
    ours = {id(tensor) for tensor in adapter_tensors(model).values()}
    return {key for key, tensor in plain_state(model).items() if id(tensor) not in ours}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """W0: the backbone's tensors by plain names, without the originals of `modules_to_save`."""
    modules = named_modules(model, remove_duplicate=False)  # with every name of a module in two places
    replaced = tuple(f"{name}." for name, module in modules if isinstance(module, SavedCopy))
    frozen, state = frozen_keys(model), plain_state(model)
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and k in frozen and not k.startswith(replaced)}


class BaseTensor(NamedTuple):
    """One of W0's tensors in one of its modules: its name in the plain model, and its key in the module."""

    name: str
    module: nn.Module
    key: str
    tensor: Tensor

    @property
    def is_parameter(self) -> bool:
        """False for a buffer."""
        return self.key in self.module._parameters


def iter_base(model: nn.Module) -> Iterator[BaseTensor]:
    """W0 module by module: parameters and persistent buffers; a tied tensor in each of its modules.

    The originals of `modules_to_save` are included. `base_tensors` is W0 as in a state dict, where a quantized layer
    adds its scales and whatever else its class writes.
    """
    copies: tuple[str, ...] = ()
    for path, module in named_modules(model):
        if path.startswith(copies):
            continue
        ours = module.lora_tensors() if isinstance(module, Grafted) else {}
        copies += (full_name(path, "lora_copy"),) if isinstance(module, SavedCopy) else ()
        saved = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for key, tensor in (*module._parameters.items(), *saved.items()):
            if tensor is not None and key not in ours:
                yield BaseTensor(full_name(path, key), module, key, tensor)


def full_name(*parts: str) -> str:
    """A dotted name from its parts; the model's name is an empty part."""
    return ".".join(part for part in parts if part)


def refuse_misfits(
    expected: Mapping[str, Any], tensors: Mapping[str, Any], what: str = "the adapter does not fit this model"
) -> None:
    """Refuse keys that are missing, left over, wrongly shaped or of another kind; other values need only be there."""
    problems = [f"missing '{key}'" for key in expected if key not in tensors]
    problems += [f"left over '{key}'{did_you_mean(key, expected)}" for key in tensors if key not in expected]
    pairs = {k: (t, tensors[k]) for k, t in expected.items() if k in tensors and isinstance(t, Tensor)}
    for key, (want, got) in pairs.items():
        if got.shape != want.shape:
            problems.append(f"'{key}' has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        if got.is_floating_point() != want.is_floating_point():
            problems.append(f"'{key}' holds {got.dtype}, expected {want.dtype}")
    if problems:
        raise AdapterError(f"{what} ({len(problems)} keys): {first_few(problems, 10)}")
