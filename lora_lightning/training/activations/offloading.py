"""Keeps what backward needs in CPU memory until then.

`torch.autograd.graph.save_on_cpu` moves all saved tensors, the frozen weights too. Here weights and small tensors stay,
and a tensor that several operations save, such as the input of query, key and value, is moved once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

from lora_lightning.lora.frozen.fingerprint import count_writes

SMALL = 2**20
"""Bytes below which a tensor stays on its device."""


class Waiting:
    """A tensor's copy in CPU memory, pinned for a GPU; copied back once for all operations that need it."""

    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        is_pinnable = self.device.type == "cuda"
        self.copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=is_pinnable)
        self.copy.copy_(tensor, non_blocking=is_pinnable)
        self._back: weakref.ref[Tensor] | None = None

    def back(self) -> Tensor:
        """The tensor on its device."""
        tensor = None if self._back is None else self._back()
        if tensor is None:
            tensor = self.copy.to(self.device, non_blocking=self.device.type == "cuda")
            self._back = weakref.ref(tensor)
        return tensor


class Offload:
    """Moves tensors that are saved for backward to the CPU.

    Args:
        small: bytes below which a tensor stays.
        stays_on: devices whose tensors stay.
    """

    def __init__(self, model: nn.Module, small: int = SMALL, stays_on: tuple[str, ...] = ("cpu", "meta")) -> None:
        self.model, self.small, self.stays_on = model, small, stays_on
        self._has_warned = False
        self.moved = 0
        """Bytes that the last forward moved."""

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within the block, tensors that operations save for backward are moved, unless all the model is on the CPU."""
        if all(p.device.type in self.stays_on for p in self.model.parameters()):
            if not self._has_warned:
                rank_zero_info("offload_activations: this run is on a CPU already, so that nothing has to be moved")
            self._has_warned = True
            yield
            return
        tensors = (*self.model.parameters(), *self.model.buffers())
        weights = {tensor.untyped_storage().data_ptr() for tensor in tensors if _is_plain(tensor)}
        seen: MutableMapping[Tensor, Any] = WeakTensorKeyDictionary()  # how often it was written into, and its copy
        self.moved = 0

        def pack(tensor: Tensor) -> Any:
            is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
            stays = is_weight or not _is_plain(tensor) or tensor.device.type in self.stays_on
            if stays or tensor.nbytes < self.small or tensor.untyped_storage().data_ptr() in weights:
                return tensor
            writes, waiting = seen.get(tensor, (None, None))
            if writes != count_writes(tensor):
                waiting = Waiting(tensor)
                seen[tensor] = count_writes(tensor), waiting
                self.moved += tensor.nbytes
            return waiting

        def unpack(packed: Any) -> Tensor:
            return packed.back() if isinstance(packed, Waiting) else packed

        with saved_tensors_hooks(pack, unpack):
            yield


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
