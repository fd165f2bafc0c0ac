"""Streams of sets that do not fit on a disk or need not be read to their end.

Rows are shuffled within a buffer, tokenized and packed while they are read. Training's stream has no end: after its
last row it begins again in another order, and `trainer.max_steps` says when to stop. N processes share a stream by
datasets' `split_dataset_by_node`. An endless stream without a file for each process is shared by turns, which go on
over its ends, so that N processes equal one.
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

from lora_lightning.lora.errors import LoRAError, first_line

AT_ONCE = 1000
"""Rows that are tokenized and packed together."""


def number_rows(stream: datasets.IterableDataset, column: str) -> datasets.IterableDataset:
    """Add a column with each row's number in its file, counted from 1."""
    return stream.map(_with_number, with_indices=True, fn_kwargs={"column": column})


def _with_number(row: dict[str, Any], i: int, column: str) -> dict[str, Any]:
    """A function of the module, which can be pickled for workers."""
    return {**row, column: i + 1}


def share_of(stream: datasets.IterableDataset, trainer: Trainer | None) -> datasets.IterableDataset:
    """This process's share of a stream."""
    if trainer is None or trainer.world_size == 1:
        return stream
    return split_dataset_by_node(stream, rank=trainer.global_rank, world_size=trainer.world_size)


def endless(stream: datasets.IterableDataset, trainer: Trainer | None) -> Endless:
    """This process's share of a stream without end."""
    if trainer is None:
        return Endless(stream)
    if stream.num_shards % trainer.world_size == 0:  # equally many files for all: none is read twice
        return Endless(share_of(stream, trainer))
    return Endless(stream, trainer.global_rank, trainer.world_size)


def refuse_endless(trainer: Trainer | None, *, validates: bool) -> None:
    """Raise where the trainer's options need the end of a stream that has none."""
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
    """A stream that is repeated without end, in another order each time.

    Args:
        stream: of rows; a shuffled one has an order for each epoch.
        rank: this process's number; the processes take turns in one order, also over the ends of the stream.
        world_size: the number of processes.
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
            if not any_row:  # this worker has none of the set's files
                return


def first_row(stream: datasets.IterableDataset, place: str) -> dict[str, Any]:
    """The first row of a stream, for its columns; one without rows, or that cannot be read, is refused."""
    try:
        row: dict[str, Any] | None = next(iter(stream), None)
    except Exception as error:  # each reader has its errors
        raise LoRAError(f"{place} cannot be read: {first_line(error.__cause__ or error)}") from error
    if row is None:
        raise LoRAError(f"{place} holds no rows")
    return row


class StreamLoader(DataLoader[Any]):
    """A loader that skips what was trained on before, and sets the epoch of a stream that shuffles.

    A stream cannot begin in its middle, and a worker does not know its earlier batches: they are made again and
    discarded.

    Args:
        stream: the same rows each time, apart from the epoch.
        trainer: the training's; None in evaluation.
        ends: whether each epoch begins the stream anew. A stream without an end goes on over epochs.
        options: of torch's DataLoader.
    """

    def __init__(
        self, stream: IterableDataset[Any], trainer: Trainer | None, *, ends: bool = True, **options: Any
    ) -> None:
        super().__init__(stream, **options)
        self.trainer, self.ends = trainer, ends
        self._was: dict[str, Any] = {}

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.trainer is None:
            return super().__iter__()
        if callable(method := getattr(self.dataset, "set_epoch", None)):
            method(self.trainer.current_epoch)
        return islice(super().__iter__(), self._batches_before(self.trainer), None)

    def _batches_before(self, trainer: Trainer) -> int:
        """The number of batches before the next one, by the loops' counts: prefetched batches are not trained on."""
        batches, epochs = trainer.fit_loop.epoch_loop.batch_progress, trainer.fit_loop.epoch_progress.current
        if not self.ends:
            had = batches.total.ready
        else:
            had = batches.current.ready if epochs.started > epochs.completed else 0  # type: ignore[attr-defined]
        was, now, self._was = self._was, self.state_dict(), {}
        changed = [f"{name} was {was[name]} and is {now[name]}" for name in was if was[name] != now[name]]
        if had and changed:
            rank_zero_warn(f"{', '.join(changed)}: some rows of the stream come again, or not at all")
        return int(had)

    def state_dict(self) -> dict[str, Any]:
        """The settings that determine the batches, beside the stream; the loops count the batches."""
        processes = 1 if self.trainer is None else self.trainer.world_size
        return {"batch_size": int(self.batch_size or 1), "num_workers": self.num_workers, "processes": processes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the settings, to compare them when the stream is resumed."""
        self._was = dict(state_dict)
