"""A DataLoader that can resume in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from lora_lightning.data.loading.sampler import EpochSampler
from lora_lightning.lora.errors import LoRAError


class ResumableLoader(DataLoader[Any]):
    """A DataLoader over an `EpochSampler`, whose state Lightning saves in a checkpoint and restores.

    The sampler skips batches from before the checkpoint, so that none of their rows is loaded. Its order is computed
    with the first batch, also where worker processes prefetch.
    """

    _epoch = 0
    _count = 0
    _loaded_state: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._epoch = getattr(self.sampler, "epoch", 0)  # the sampler may get the next epoch before this is saved
        self._count = self._skip_to_place()
        for batch in super().__iter__():
            self._count += 1  # before the batch, so that it counts once it is trained on
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the number of its batches so far, and the settings of its order."""
        return {"epoch": self._epoch, "batches": self._count, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume there when an iteration over that epoch begins."""
        self._loaded_state = dict(state_dict)
        if isinstance(self.sampler, EpochSampler):
            self.sampler.set_epoch(int(state_dict["epoch"]))

    @property
    def keeps_place(self) -> bool:
        """Whether the loader can resume; other samplers, such as Lightning's for `overfit_batches`, cannot skip."""
        return isinstance(self.sampler, EpochSampler)

    def _order(self) -> dict[str, Any]:
        order = getattr(self.sampler, "identity", None)
        return {"sampler": type(self.sampler).__name__} if order is None else dict(order)

    def _skip_to_place(self) -> int:
        """Let the sampler skip to the loaded position, if it is in the epoch that begins.

        Raises:
            LoRAError: the order of rows has changed since.
        """
        state = self._loaded_state
        sampler = self.sampler
        if state is None or not isinstance(sampler, EpochSampler) or sampler.epoch != state["epoch"]:
            return 0
        was, now = state["order"], self._order()
        if other := [name for name in was if was[name] != now.get(name)]:
            moved = ", ".join(f"{name} was {was[name]} and is {now.get(name)}" for name in other)
            raise LoRAError(
                f"the checkpoint lies in the middle of an epoch, and the rows would now come in another order: {moved};"
                " go on with what it was, or from a checkpoint of an epoch's end"
            )
        sampler.skip(int(state["batches"]))
        return int(state["batches"])


def seeded_generator(seed: int) -> torch.Generator:
    """A loader's generator: each iteration takes a seed for its workers, by default from the global generator.

    How often that happens depends on whether workers persist, and so on where a fit was interrupted.
    """
    return torch.Generator().manual_seed(seed)
