"""Take an adapter out of its model and put it back: the same tensors, nothing allocated, initialized or copied.

`graft` gives a module another class and a few more entries, and both can be removed and restored. A detached adapter
holds them as data, and any number of adapters can be stored beside one W0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.frozen.quantization import hold_packing
from lora_lightning.lora.inject import grafted_modules, guard_saving
from lora_lightning.lora.layers import Grafted, class_swap
from lora_lightning.lora.layers.parameter import CHILD
from lora_lightning.lora.layers.trained.module_copy import COPY

STORES = ("_parameters", "_buffers", "_modules")


@dataclass
class Share:
    """The part of an adapter that belongs to one module of the model."""

    path: str
    module: nn.Module
    """The module, which alone has the W0 that the adapter belongs to."""
    plain: type[nn.Module]
    grafted: type[nn.Module]
    """The module's classes without and with the adapter."""
    stores: dict[str, dict[str, Any]]
    """The adapter's entries in the module's parameters, buffers, children and attributes."""

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of this share."""
        for store in ("_parameters", "_buffers"):
            yield from (tensor for tensor in self.stores[store].values() if tensor is not None)
        for child in self.stores["_modules"].values():
            yield from (*child.parameters(), *child.buffers())

    def holds_same(self) -> bool:
        """Whether the module still has this adapter, and no other."""
        return type(self.module) is self.grafted and all(
            vars(self.module)[store].get(name) is value
            for store in STORES
            for name, value in self.stores[store].items()
        )

    def put_in(self) -> None:
        """Add this share to the module, on its device; new children get the mode of the module they belong to."""
        module = self.module
        if (tensor := next(chain(module.parameters(), module.buffers()), None)) is not None:
            self.move(tensor.device)
        module.__class__ = self.grafted
        for store, entries in self.stores.items():
            getattr(module, store).update(entries)
        for name, child in self.stores["_modules"].items():
            if name == COPY:
                named = module.named_modules(remove_duplicate=False)
                originals = dict.fromkeys(m for path, m in named if path.partition(".")[0] != COPY)
                for twin, original in zip(child.modules(), originals, strict=True):
                    twin.training = original.training
            else:
                child.train(module.training)

    def move(self, device: torch.device) -> None:
        """Move the adapter's tensors as `nn.Module.to` does: parameters stay the same objects."""
        if all(tensor.device == device for tensor in self.tensors()):
            return
        holder = nn.Module()
        for store in STORES:
            holder.__dict__[store] = self.stores[store]
        holder.to(device)


def find_adapter(model: nn.Module) -> list[Share]:
    """The adapter that `model` has, which stays in place: a share for each module that it changes."""
    return [_share(path, module) for path, module in grafted_modules(model) if not _is_adapter_part(path)]


def take_out(model: nn.Module, device: torch.device | None = None) -> list[Share]:
    """Take the adapter out of the model, which is then plain, and move it to `device`, if given.

    Unlike after `remove`, a 4-bit base is not repacked, which would round the adapter's W0.
    """
    held = find_adapter(model)
    for share in held:
        class_swap.take_out(share.module)
    guard_saving(model, is_adapted=False)
    move(held, device)
    return held


def move(held: list[Share], device: torch.device | None) -> None:
    """Move the adapter to `device`; None leaves it where it is."""
    if device is not None:
        for share in held:
            share.move(device)


def put_in(model: nn.Module, held: list[Share]) -> None:
    """Put the adapter into the plain `model`, on the device of each module that it changes.

    After an error, such as too little memory on the device, the model is plain.
    """
    hold_packing(model)
    try:
        for share in held:
            share.put_in()
        guard_saving(model, is_adapted=bool(held))
    except BaseException:
        for share in held:
            class_swap.take_out(share.module)
        raise


def refuse_replaced(model: nn.Module, held: list[Share]) -> None:
    """Raise an AdapterError where a module of the adapter is no longer in the model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for share in held:
        if modules.get(share.path) is not share.module or class_swap.own_class(type(share.module)) is not share.plain:
            raise AdapterError(
                f"'{share.path}' is not the module that the adapter belongs to: it was replaced since; make a new bank"
            )


def _share(path: str, module: Grafted) -> Share:
    stores = {
        store: {name: entry for name, entry in getattr(module, store).items() if name.startswith("lora_")}
        for store in (*STORES, "__dict__")
    }
    return Share(path, module, class_swap.own_class(type(module)), type(module), stores)


def _is_adapter_part(path: str) -> bool:
    """Whether this module is inside the adapter, and so belongs to the share of the module that holds it."""
    return any(part == COPY or part.startswith(CHILD) for part in path.split("."))
