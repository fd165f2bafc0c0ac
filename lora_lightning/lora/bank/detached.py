"""Take an adapter out of its model and put it back: the same tensors, nothing allocated, initialized or copied.

`graft` gives a module another class and a few more entries, and both can be removed and restored. A detached adapter
holds them as data, and any number of adapters can be stored beside one W0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.frozen.quantization import hold_packing
from lora_lightning.lora.inject import grafted_modules, guard_saving
from lora_lightning.lora.layers import class_swap
from lora_lightning.lora.layers.parameter import CHILD
from lora_lightning.lora.layers.trained.module_copy import COPY

STORES = ("_parameters", "_buffers", "_modules")


@dataclass
class Share:
    """The part of an adapter that belongs to one module of the model."""

    path: str
    module: nn.Module
    """The module, which alone has the W0 that the adapter belongs to."""
    grafted: type[nn.Module]
    """The module's class with the adapter."""
    stores: dict[str, dict[str, Any]]
    """The adapter's entries in the module's parameters, buffers, children and attributes."""

    def holder(self) -> nn.Module:
        """A module with this share's parameters, buffers and children alone."""
        holder = nn.Module()
        holder.__dict__.update({store: self.stores[store] for store in STORES})
        return holder

    def tensors(self) -> list[Tensor]:
        """Every tensor of this share."""
        holder = self.holder()
        return [*holder.parameters(), *holder.buffers()]

    def holds_same(self) -> bool:
        """Whether the module still has this adapter, and no other."""
        return type(self.module) is self.grafted and all(
            getattr(self.module, store).get(name) is value
            for store in STORES
            for name, value in self.stores[store].items()
        )

    def put_in(self, module: nn.Module) -> None:
        """Add this share to `module`; new children get the mode of the module that they belong to."""
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
        if any(tensor.device != device for tensor in self.tensors()):
            self.holder().to(device)


def twin_of(module: nn.Module, share: Share | None) -> Any:
    """An adapted (with `share`) or plain twin of the plain `module`: another object with the same tensors."""
    twin = type(module).__new__(type(module))
    twin.__dict__.update(vars(module) | {store: dict(getattr(module, store)) for store in STORES})
    if share is not None:
        share.put_in(twin)
    return twin


def find_adapter(model: nn.Module) -> list[Share]:
    """The adapter that `model` has, which stays in place, as one share for each module that it changes."""
    shares = []
    for path, module in grafted_modules(model):
        if any(part == COPY or part.startswith(CHILD) for part in path.split(".")):
            continue  # it is inside the adapter, and belongs to the share of the module that holds it
        stores = {
            store: {name: entry for name, entry in getattr(module, store).items() if name.startswith("lora_")}
            for store in (*STORES, "__dict__")
        }
        shares.append(Share(path, module, type(module), stores))
    return shares


def take_out(model: nn.Module, device: torch.device | None = None) -> list[Share]:
    """Take the adapter out of the model, and move it to `device`, if given; a 4-bit W0 is not repacked (rounded)."""
    held = find_adapter(model)
    for share in held:
        class_swap.take_out(share.module)
    guard_saving(model, is_adapted=False)
    to_device(held, device)
    return held


def to_modules(held: list[Share]) -> None:
    """Move each share to the device of the module that it belongs to."""
    for share in held:
        tensor = next(iter((*share.module.parameters(), *share.module.buffers())), None)
        if tensor is not None:
            share.move(tensor.device)


def to_device(held: list[Share], device: torch.device | None) -> None:
    """Move the adapter to `device`; None leaves it where it is."""
    if device is not None:
        for share in held:
            share.move(device)


def put_in(model: nn.Module, held: list[Share]) -> None:
    """Put the adapter into the plain `model`, on its modules' devices; after an error the model is plain."""
    hold_packing(model)
    try:
        to_modules(held)
        for share in held:
            share.put_in(share.module)
        guard_saving(model, is_adapted=bool(held))
    except BaseException:
        for share in held:
            class_swap.take_out(share.module)
        raise


def refuse_replaced(model: nn.Module, held: list[Share]) -> None:
    """Raise an AdapterError where a module of the adapter is no longer in the model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for share in held:
        is_plain = class_swap.own_class(type(share.module)) is class_swap.own_class(share.grafted)
        if modules.get(share.path) is not share.module or not is_plain:
            raise AdapterError(
                f"'{share.path}' is not the module that the adapter belongs to: it was replaced since; make a new bank"
            )
