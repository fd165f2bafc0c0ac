"""An adapter taken out of its model and put back: the same tensors, nothing allocated, drawn or copied.

`graft` gives a module another class and a few more entries; both come off as they went on. What is taken out is data
that waits beside the plain model, and any number of adapters can wait beside one W0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.frozen.quantization import hold_packing
from lora_lightning.lora.inject import grafted_modules, guard_saving
from lora_lightning.lora.layers import AdaptedLayer, Grafted, LoRAParameter, class_swap
from lora_lightning.lora.layers.parameter import CHILD
from lora_lightning.lora.layers.trained.module_copy import COPY

STORES = ("_parameters", "_buffers", "_modules")


@dataclass
class Share:
    """What one module of the model holds for an adapter."""

    path: str
    module: nn.Module
    """The module itself, for no other has the same W0."""
    plain: type[nn.Module]
    grafted: type[nn.Module]
    """Its classes without and with the adapter."""
    stores: dict[str, dict[str, Any]]
    """What the adapter adds to the module's parameters, buffers, children and attributes."""

    @property
    def layers(self) -> dict[str, LoRAParameter]:
        """The factors of bare parameters, by their paths: they are children of the module."""
        children = self.stores["_modules"].items()
        return {f"{self.path}.{n}".removeprefix("."): m for n, m in children if isinstance(m, LoRAParameter)}

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the adapter here."""
        for store in ("_parameters", "_buffers"):
            yield from (tensor for tensor in self.stores[store].values() if tensor is not None)
        for child in self.stores["_modules"].values():
            yield from (*child.parameters(), *child.buffers())

    def holds_same(self) -> bool:
        """Whether the module still holds this adapter, and no other."""
        return type(self.module) is self.grafted and all(
            vars(self.module)[store].get(name) is value
            for store in STORES
            for name, value in self.stores[store].items()
        )

    def put_in(self, module: nn.Module) -> None:
        """Extend `module` by this share; new children run in the mode of what they belong to."""
        module.__class__ = self.grafted
        for store, entries in self.stores.items():
            _store(module, store).update(entries)
        for name, child in self.stores["_modules"].items():
            if name == COPY:
                modules = [m for path, m in module.named_modules(remove_duplicate=False) if not _within_copy(path)]
                for twin, original in zip(child.modules(), dict.fromkeys(modules), strict=True):
                    twin.training = original.training
            else:
                child.train(module.training)

    def move(self, device: torch.device) -> None:
        """Move the adapter's tensors, not the module's, as `nn.Module.to` does: parameters stay the same objects."""
        if all(tensor.device == device for tensor in self.tensors()):
            return
        holder = nn.Module()
        for store in STORES:
            holder.__dict__[store] = self.stores[store]
        holder.to(device)


def twin_of(module: nn.Module, share: Share | None) -> Any:
    """The adapted module beside the plain `module`: another object over the same tensors, W0's among them.

    Args:
        share: what the adapter adds to it; None for a plain twin.
    """
    twin = type(module).__new__(type(module))
    twin.__dict__.update(vars(module))
    for store in STORES:
        twin.__dict__[store] = dict(vars(module)[store])
    if share is not None:
        share.put_in(twin)
    return twin


@dataclass
class DetachedAdapter:
    """An adapter as it waits, by the modules that it touches."""

    shares: list[Share]

    def layers(self) -> dict[str, AdaptedLayer]:
        """Its adapted layers by their paths in the adapted model, beside a model that is plain at the time."""
        layers: dict[str, AdaptedLayer] = {}
        for share in self.shares:
            layers |= share.layers
            if issubclass(share.grafted, AdaptedLayer):
                layers[share.path] = twin_of(share.module, share)
        return layers

    def nbytes(self) -> int:
        """Bytes of its tensors, each once."""
        return sum({id(t): t.nbytes for share in self.shares for t in share.tensors()}.values())


def find_adapter(model: nn.Module) -> DetachedAdapter:
    """The adapter that `model` has, as it is in place; no shares where there is none."""
    adapted = [(path, module) for path, module in grafted_modules(model) if not _is_adapter_part(path)]
    return DetachedAdapter([_share(path, module) for path, module in adapted])


def take_out(model: nn.Module, device: torch.device | None = None) -> DetachedAdapter:
    """Take the adapter out: the model is plain, as after `remove`. `device` is where the adapter waits.

    Only a 4-bit base is still kept from being repacked, which would round the W0 that the adapter belongs to.
    """
    held = find_adapter(model)
    for share in held.shares:
        class_swap.take_out(share.module)
    guard_saving(model, is_adapted=False)
    to_device(held, device)
    return held


def to_modules(held: DetachedAdapter) -> None:
    """Move each share to the device of the module that it belongs to."""
    for share in held.shares:
        first = next(iter((*share.module.parameters(), *share.module.buffers())), None)
        if first is not None:
            share.move(first.device)


def to_device(held: DetachedAdapter, device: torch.device | None) -> None:
    """Move the adapter to where it waits; None leaves it where it is."""
    if device is not None:
        for share in held.shares:
            share.move(device)


def put_in(model: nn.Module, held: DetachedAdapter) -> None:
    """Put the adapter into the plain `model`, on the device of each module that it touches.

    Where that fails, as where the device has no room, the model is plain.
    """
    hold_packing(model)
    try:
        to_modules(held)
        for share in held.shares:
            share.put_in(share.module)
        guard_saving(model, is_adapted=bool(held.shares))
    except BaseException:
        for share in held.shares:
            class_swap.take_out(share.module)
        raise


def refuse_replaced(model: nn.Module, held: DetachedAdapter) -> None:
    """Raise an AdapterError where a module that the adapter belongs to is no longer in the model, adapted or plain."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for share in held.shares:
        if modules.get(share.path) is not share.module or class_swap.own_class(type(share.module)) is not share.plain:
            raise AdapterError(
                f"'{share.path}' is not the module that the adapter belongs to: it was replaced since; make a new bank"
            )


def _share(path: str, module: Grafted) -> Share:
    stores = {store: _lora_entries(_store(module, store)) for store in (*STORES, "__dict__")}
    return Share(path, module, class_swap.own_class(type(module)), type(module), stores)


def _lora_entries(entries: dict[str, Any]) -> dict[str, Any]:
    """Whatever a graft adds starts so."""
    return {name: value for name, value in entries.items() if name.startswith("lora_")}


def _store(module: nn.Module, store: str) -> dict[str, Any]:
    entries: dict[str, Any] = module.__dict__ if store == "__dict__" else module.__dict__[store]
    return entries


def _is_adapter_part(path: str) -> bool:
    """Whether this is a part of the adapter itself, which goes with the module that holds it."""
    return any(part == COPY or part.startswith(CHILD) for part in path.split("."))


def _within_copy(path: str) -> bool:
    return path.partition(".")[0] == COPY
