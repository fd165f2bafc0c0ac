"""What backward needs waits in the CPU's memory until it is needed.

`torch.autograd.graph.save_on_cpu` moves whatever is saved, the frozen weights too. Here weights stay where they are,
what is small is not worth a transfer, and a tensor that several operations save, as the input of query, key and value,
is moved once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lora_lightning.lora.frozen.version_check import count_writes

SMALL = 2**20
"""Bytes below which a tensor stays on its device."""


class Waiting:
    """A tensor's copy in the CPU's memory, pinned where it came from a GPU; brought back once for all who ask."""

    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        is_pinnable = self.device.type == "cuda"
        self.copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=is_pinnable)
        self.copy.copy_(tensor, non_blocking=is_pinnable)
        self._back: weakref.ref[Tensor] | None = None

    def back(self) -> Tensor:
        """On its own device."""
        there = None if self._back is None else self._back()
        if there is None:
            there = self.copy.to(self.device, non_blocking=self.device.type == "cuda")
            self._back = weakref.ref(there)
        return there


class Offload:
    """Moves what is saved for backward, on any device but those in `stays_on`.

    Args:
        small: bytes below which a tensor stays.
        stays_on: devices whose tensors are where they would be moved to.
    """

    def __init__(self, model: nn.Module, small: int = SMALL, stays_on: tuple[str, ...] = ("cpu", "meta")) -> None:
        self.model, self.small, self.stays_on = model, small, stays_on
        self._has_warned = False
        self.moved = 0
        """Bytes that the last forward moved."""

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within the block, what operations save for backward is moved; nothing where the model itself is there."""
        if all(p.device.type in self.stays_on for p in self.model.parameters()):
            if not self._has_warned:
                self._has_warned = True
                rank_zero_info("offload_activations: this run is on a CPU already, so that nothing has to be moved")
            yield
            return
        tensors = (*self.model.parameters(), *self.model.buffers())
        weights = {tensor.untyped_storage().data_ptr() for tensor in tensors if _is_plain(tensor)}
        # By the tensor's identity: the reference says whether it is still the same one.
        seen: dict[int, tuple[weakref.ref[Tensor], int, Waiting]] = {}
        self.moved = 0

        def pack(tensor: Tensor) -> Any:
            if not self._is_moved(tensor, weights):
                return tensor
            known = seen.get(id(tensor))
            if known is not None and known[0]() is tensor and known[1] == count_writes(tensor):
                return known[2]
            waiting = Waiting(tensor)
            seen[id(tensor)] = (weakref.ref(tensor), count_writes(tensor), waiting)
            self.moved += tensor.nbytes
            return waiting

        def unpack(packed: Any) -> Tensor:
            return packed.back() if isinstance(packed, Waiting) else packed

        with saved_tensors_hooks(pack, unpack):
            yield
        seen.clear()

    def _is_moved(self, tensor: Tensor, weights: set[int]) -> bool:
        if not _is_plain(tensor) or tensor.device.type in self.stays_on or tensor.nbytes < self.small:
            return False
        is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        return not is_weight and tensor.untyped_storage().data_ptr() not in weights


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
