"""What was found of tensors in this process, so that fit, checkpoint and export need not hash each again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class _Found:
    """A digest, and the state of the tensor that it is of."""

    digest: str
    storage: StorageWeakRef
    """Keeps no bytes alive; while it is held, no later storage can be taken for this one."""
    where: tuple[int, torch.Size, tuple[int, ...], torch.dtype]
    """Address, shape, strides, dtype."""
    version: int
    """How often torch saw the tensor written to; it does not see writes through `.data`."""


_FOUND = WeakTensorKeyDictionary()


def known(tensor: Tensor) -> str | None:
    """The digest that was remembered of this very tensor, if torch has seen no write to it since."""
    found = _FOUND.get(tensor) if _can_be_followed(tensor) else None  # type: ignore[no-untyped-call]
    return found.digest if isinstance(found, _Found) and found == _state(tensor, found.digest) else None


def remember(tensor: Tensor, digest: str) -> None:
    """Keep a digest for as long as the tensor lives."""
    if _can_be_followed(tensor):
        _FOUND[tensor] = _state(tensor, digest)


def _state(tensor: Tensor, digest: str) -> _Found:
    where = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
    storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    return _Found(digest, storage, where, tensor._version)


def _can_be_followed(tensor: Tensor) -> bool:
    """An inference tensor counts no writes, and a tensor made of tensors has no storage."""
    return not (tensor.is_inference() or tensor.is_meta or is_traceable_wrapper_subclass(tensor))
