"""A DataLoader that knows how far an epoch has come, and can go on from there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from lora_lightning.data.loading.sampler import EpochSampler
from lora_lightning.lora.errors import LoRAError


class ResumableLoader(DataLoader[Any]):
    """A DataLoader over an `EpochSampler`, whose place Lightning keeps in a checkpoint and puts back from it.

    Batches that were given before are skipped in the sampler, so that none of their rows is loaded. The sampler is
    asked for its order when the first batch is, also where worker processes fetch ahead.
    """

    _epoch = 0
    _given = 0
    _came_to: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._epoch = getattr(self.sampler, "epoch", 0)  # the sampler may be told the next one before this is saved
        self._given = self._skip_to_place()
        for batch in super().__iter__():
            self._given += 1  # in front of the batch: once it is trained on, it counts
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch, how many of its batches were given, and what its order hangs on."""
        return {"epoch": self._epoch, "batches": self._given, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there once an iteration over that epoch begins."""
        self._came_to = dict(state_dict)
        if isinstance(self.sampler, EpochSampler):
            self.sampler.set_epoch(int(state_dict["epoch"]))

    @property
    def keeps_place(self) -> bool:
        """Another sampler, as Lightning puts in for `overfit_batches`, cannot be told what to leave out."""
        return isinstance(self.sampler, EpochSampler)

    def _order(self) -> dict[str, Any]:
        order = getattr(self.sampler, "identity", None)
        return {"sampler": type(self.sampler).__name__} if order is None else dict(order)

    def _skip_to_place(self) -> int:
        """Put the sampler to the place that was loaded, if it is in the epoch that begins.

        Raises:
            LoRAError: the order is another one than that in which the place was taken.
        """
        state = self._came_to
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


def own_generator(seed: int) -> torch.Generator:
    """For a loader: each iteration draws a seed for its workers, and would draw it from everyone's random numbers.

    How often that happens hangs on whether workers are kept, and so on where a fit was interrupted.
    """
    return torch.Generator().manual_seed(seed)
