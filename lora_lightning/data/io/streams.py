"""Sets that are read as they are needed, for those that do not fit on a disk or need not be read to their end.

Rows are shuffled within a buffer, tokenized and packed on the way. Training's stream has no end: it begins anew in
another order when the set is through, and `trainer.max_steps` says when to stop. N processes share a stream by
datasets' `split_dataset_by_node`. One that begins anew and has not a file for each they share by turns that go on over
its ends, since N processes are to equal one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import datasets
from datasets.distributed import split_dataset_by_node
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from lora_lightning.lora.errors import LoRAError

AT_ONCE = 1000
"""Rows that are tokenised, and packed, together."""


def number_rows(stream: datasets.IterableDataset, column: str) -> datasets.IterableDataset:
    """With each row's number in its file, counted from 1, in a column of this name."""
    return stream.map(_with_number, with_indices=True, fn_kwargs={"column": column})


def _with_number(row: dict[str, Any], i: int, column: str) -> dict[str, Any]:
    """With a name of its own: it goes to workers, pickled where they are not forked."""
    return {**row, column: i + 1}


def share_of(stream: datasets.IterableDataset, trainer: Trainer | None) -> datasets.IterableDataset:
    """What falls to this process."""
    if trainer is None or trainer.world_size == 1:
        return stream
    return split_dataset_by_node(stream, rank=trainer.global_rank, world_size=trainer.world_size)


def endless(stream: datasets.IterableDataset, trainer: Trainer | None) -> Endless:
    """What falls to this process of one that does not."""
    if trainer is None:
        return Endless(stream)
    if stream.num_shards % trainer.world_size == 0:  # files for all: none is read twice
        return Endless(share_of(stream, trainer))
    return Endless(stream, trainer.global_rank, trainer.world_size)


def refuse_endless(trainer: Trainer | None, *, validates: bool) -> None:
    """Raise where a trainer waits for the end of a stream that has none."""
    if trainer is None:
        return
    if trainer.max_steps == -1:
        raise LoRAError("a stream has no end: set trainer.max_steps to the number of optimizer steps to train for")
    if validates and trainer.limit_val_batches and not isinstance(trainer.val_check_interval, int):
        raise LoRAError(
            "a stream has no end at which to validate: set trainer.val_check_interval to a number of batches, or"
            " trainer.limit_val_batches to 0"
        )


class Endless(IterableDataset[Any]):
    """A stream over and over again, in another order each time.

    Args:
        stream: of rows; shuffled, it has an order for each epoch.
        rank: of `world_size` processes that take turns in one order, over the ends of the stream too.
        world_size: how many there are.
    """

    def __init__(self, stream: datasets.IterableDataset, rank: int = 0, world_size: int = 1) -> None:
        self.stream, self.rank, self.world_size = stream, rank, world_size

    def __iter__(self) -> Iterator[Any]:
        return islice(self._rows(), self.rank, None, self.world_size)

    def _rows(self) -> Iterator[Any]:
        for epoch in count():
            self.stream.set_epoch(epoch)
            any_row = False
            for row in self.stream:
                any_row = True
                yield row
            if not any_row:  # of the set's files, this worker has none
                return


def first_row(stream: datasets.IterableDataset, place: str) -> dict[str, Any]:
    """To see what columns there are.

    Raises:
        LoRAError: there is none, or it cannot be read.
    """
    try:
        row: dict[str, Any] | None = next(iter(stream), None)
    except Exception as error:  # each reader's own
        cause = error.__cause__ or error
        raise LoRAError(f"{place} cannot be read: {str(cause).strip().splitlines()[0]}") from error
    if row is None:
        raise LoRAError(f"{place} holds no rows")
    return row


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
        if callable(method := getattr(self.dataset, "set_epoch", None)):
            method(self.trainer.current_epoch)
        return islice(super().__iter__(), self._batches_before(self.trainer), None)

    def _batches_before(self, trainer: Trainer) -> int:
        """Batches before the one that comes next, by what the loops count: what is fetched ahead is not trained on."""
        batches, epochs = trainer.fit_loop.epoch_loop.batch_progress, trainer.fit_loop.epoch_progress.current
        if not self.ends:
            had = batches.total.ready
        else:
            had = batches.current.ready if epochs.started > epochs.completed else 0  # type: ignore[attr-defined]
        was, self._was = self._was, {}
        if had and (other := [name for name in was if was[name] != self._dealing()[name]]):
            differences = ", ".join(f"{name} was {was[name]} and is {self._dealing()[name]}" for name in other)
            rank_zero_warn(f"{differences}: some rows of the stream come again, or not at all")
        return int(had)

    def _dealing(self) -> dict[str, int]:
        """What the batches hang on, beside the stream."""
        processes = 1 if self.trainer is None else self.trainer.world_size
        return {"batch_size": int(self.batch_size or 1), "num_workers": self.num_workers, "processes": processes}

    def state_dict(self) -> dict[str, Any]:
        """How batches are dealt; how many were had, the loops count."""
        return self._dealing()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compared once the stream is begun in its middle."""
        self._was = dict(state_dict)
