"""A DataLoader over a stream, that goes on behind the batches which an interrupted run has had."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset


class StreamLoader(DataLoader[Any]):
    """Leaves out what was trained on before, and tells a stream that shuffles itself which epoch it is.

    A stream cannot be asked for its middle, nor can each worker know which batches were its own: what was had is read
    and made into batches again, and let go.

    Args:
        stream: what is read, alike each time but for the epoch.
        trainer: that trains on it; None in evaluation.
        ends: whether each epoch begins the stream anew. One without an end goes on through all of them.
        options: of torch's DataLoader.
    """

    def __init__(
        self, stream: IterableDataset[Any], trainer: Trainer | None, *, ends: bool = True, **options: Any
    ) -> None:
        super().__init__(stream, **options)
        self.trainer, self.ends = trainer, ends
        self._was: dict[str, int] = {}

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.trainer is None:
            return super().__iter__()
        if callable(own := getattr(self.dataset, "set_epoch", None)):
            own(self.trainer.current_epoch)
        return islice(super().__iter__(), self._had(self.trainer), None)

    def _had(self, trainer: Trainer) -> int:
        """Batches before the one that comes next, by what the loops count: what is fetched ahead is not trained on."""
        batches, epochs = trainer.fit_loop.epoch_loop.batch_progress, trainer.fit_loop.epoch_progress.current
        if not self.ends:
            had = batches.total.ready
        else:
            had = batches.current.ready if epochs.started > epochs.completed else 0  # type: ignore[attr-defined]
        was, self._was = self._was, {}
        if had and (other := [name for name in was if was[name] != self._dealt()[name]]):
            told = ", ".join(f"{name} was {was[name]} and is {self._dealt()[name]}" for name in other)
            rank_zero_warn(f"{told}: some rows of the stream come again, or not at all")
        return int(had)

    def _dealt(self) -> dict[str, int]:
        """What the batches hang on, beside the stream."""
        processes = 1 if self.trainer is None else self.trainer.world_size
        return {"batch_size": int(self.batch_size or 1), "num_workers": self.num_workers, "processes": processes}

    def state_dict(self) -> dict[str, Any]:
        """How batches are dealt; how many were had, the loops count."""
        return self._dealt()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compared once the stream is begun in its middle."""
        self._was = dict(state_dict)
