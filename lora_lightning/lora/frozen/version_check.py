"""Whether the base is what it was, without reading it: torch counts how often a tensor is written into.

A fingerprint proves more and takes a second for each GiB; this takes a millisecond and sees a merge, a
`load_state_dict`, an optimizer's step and running statistics that went on. Moving a model to another device or dtype is
no write: parameters then stay the objects that they are, and buffers, which do not, are compared by their values where
they are small.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lightning.lora.bank.detached import is_inside
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.frozen.tensors import named_modules
from lora_lightning.lora.layers import Grafted

SMALL = 2**16
"""Entries of a buffer of which a copy is kept: statistics have a few thousand."""


@dataclass
class Mark:
    """Which object a tensor of the base is, and how often it was written into."""

    tensor: weakref.ref[Tensor]
    version: int
    values: Tensor | None = None
    """A copy of a small buffer."""

    def fits(self, now: Tensor) -> bool:
        """Whether `now` is what the tensor was."""
        if self.tensor() is now:
            return _version(now) == self.version
        return self.values is not None and torch.equal(self.values.to(now), now)


Marks = dict[str, Mark]


def marks(model: nn.Module) -> Marks:
    """Of every parameter of the base and every buffer that its state dict holds."""
    found: Marks = {}
    for name, tensor, is_buffer in _tensors(model):
        small = is_buffer and tensor.numel() <= SMALL
        found[name] = Mark(weakref.ref(tensor), _version(tensor), tensor.detach().clone() if small else None)
    return found


def refuse_moved(model: nn.Module, before: Marks) -> None:
    """Raise an AdapterError where a tensor of the base was replaced or written into since."""
    for name, tensor, is_buffer in _tensors(model):
        mark = before.get(name)
        moved_along = is_buffer and mark is not None and mark.values is None and mark.tensor() is not tensor
        if not moved_along and (mark is None or not mark.fits(tensor)):
            raise AdapterError(
                f"W0 moved since the bank was made, first '{name}': a merge is the end of a bank, whose other adapters"
                f" belong to the base as it was; load that and make a new bank"
            )


def _tensors(model: nn.Module) -> list[tuple[str, Tensor, bool]]:
    """Names, tensors, and whether they are buffers."""
    found: list[tuple[str, Tensor, bool]] = []
    for path, module in named_modules(model):
        if is_inside(path):
            continue
        kept = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for store, is_buffer in ((module._parameters, False), (kept, True)):
            for name, tensor in store.items():
                ours = isinstance(module, Grafted) and name in module.lora_all_names
                if tensor is not None and not ours:
                    found.append((f"{path}.{name}".removeprefix("."), tensor, is_buffer))
    return found


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
