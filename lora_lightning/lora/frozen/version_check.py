"""Check that W0 has not changed without reading it: torch counts how often a tensor is written into.

A fingerprint proves more and takes a second for each GiB; this takes a millisecond and detects a merge, a
`load_state_dict`, an optimizer's step and updated running statistics. Moving a model to another device or dtype is no
write: parameters stay the same objects; buffers do not, and small ones are compared by their values.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.frozen.tensors import BaseTensor, iter_base

SMALL = 2**16
"""Largest number of entries of a buffer that is copied for comparison: statistics have a few thousand."""


@dataclass
class Version:
    """The identity of a tensor of W0, and how often it was written into."""

    tensor: weakref.ref[Tensor]
    count: int
    values: Tensor | None
    """A copy of a small buffer."""

    def fits(self, now: BaseTensor) -> bool:
        """Whether the tensor is unchanged; a large buffer that was replaced counts as unchanged."""
        if self.tensor() is now.tensor:
            return count_writes(now.tensor) == self.count
        if self.values is None:
            return not now.is_parameter
        return torch.equal(self.values.to(now.tensor), now.tensor)


def base_versions(model: nn.Module) -> dict[str, Version]:
    """The present versions of all of W0's tensors."""
    versions: dict[str, Version] = {}
    for place in iter_base(model):
        small = not place.is_parameter and place.tensor.numel() <= SMALL
        values = place.tensor.detach().clone() if small else None
        versions[place.name] = Version(weakref.ref(place.tensor), count_writes(place.tensor), values)
    return versions


def refuse_moved(model: nn.Module, before: dict[str, Version]) -> None:
    """Raise an AdapterError where a tensor of W0 was replaced or written into since `before`."""
    for place in iter_base(model):
        version = before.get(place.name)
        if version is None or not version.fits(place):
            raise AdapterError(
                f"W0 moved since the bank was made, first '{place.name}': a merge is the end of a bank, whose other"
                f" adapters belong to the base as it was; load that and make a new bank"
            )


def count_writes(tensor: Tensor) -> int:
    """The number of writes into the tensor; torch has no public name for it."""
    return 0 if tensor.is_inference() else tensor._version
