"""The order of examples, a function of (seed, epoch) alone, and loaders that resume in the middle of an epoch."""

from __future__ import annotations

import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence, Sized
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lora_lightning.lora.errors import LoRAError

WINDOW = 50
"""Batches within which examples are sorted by length; transformers' value. A larger one pads and shuffles less."""


class EpochSampler(DistributedSampler[Any]):
    """Shuffled order, optionally with texts of similar length in one batch.

    `num_replicas` processes take turns within one order, so that together their batches are those of one process with
    batches `num_replicas` times as large. In training all must have equally many batches: where some would be one
    short, they get a padding batch, a repeated example that counts for nothing. Lightning does not replace a
    `DistributedSampler`.

    Args:
        lengths: of each example; with them, batches have examples of similar length, and the longest batch comes first,
            so that a lack of memory shows at once.
        shuffle: use a new order each epoch; without it, the data's order, with each example once.
    """

    def __init__(
        self,
        data: Sized,
        *,
        batch_size: int,
        lengths: Sequence[int] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(data, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        if len(data) < num_replicas:
            raise LoRAError(f"{len(data)} examples are fewer than the {num_replicas} processes: use fewer devices")
        self.count, self.batch_size = len(data), batch_size
        self.block = batch_size * num_replicas
        self._skip = (-1, 0)
        self.lengths = None if lengths is None else torch.as_tensor(lengths)

    def __iter__(self) -> Iterator[int]:
        epoch, first = self._skip
        return iter(self.order()[self.rank :: self.num_replicas][first if epoch == self.epoch else 0 :])

    def skip(self, batches: int) -> None:
        """Skip this epoch's first batches; other epochs are whole. The length stays that of a whole epoch."""
        self._skip = (self.epoch, batches * self.block // self.num_replicas)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that determine an epoch's order, as plain values."""
        lengths = None if self.lengths is None else zlib.crc32(self.lengths.long().numpy().tobytes())
        return {
            "rows": self.count,
            "batch_size": self.block // self.num_replicas,
            "processes": self.num_replicas,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "lengths": lengths,
        }

    def __len__(self) -> int:
        return len(range(self.rank, self._padded_length(), self.num_replicas))

    def order(self) -> list[int]:
        """This epoch's order over all processes."""
        if not self.shuffle:
            return list(range(self.count))
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) & 0x7FFF_FFFF_FFFF_FFFF)
        order = torch.randperm(self.count, generator=generator)
        if self.lengths is not None:
            order = self._by_length(order, self.lengths, generator)
        return order.repeat(self.num_replicas)[: self._padded_length()].tolist()

    def is_padding(self, batch: int) -> bool:
        """Whether this process's batch of this number, from 0, is only padding."""
        last = len(self) - 1
        return batch * self.batch_size == last and self.rank + last * self.num_replicas >= self.count

    def _padded_length(self) -> int:
        """The number of examples of all processes, with repeated ones that give each equally many batches."""
        turns, left = divmod(self.count, self.num_replicas)
        short = self.shuffle and left > 0 and turns % self.batch_size == 0
        return self.count + (self.num_replicas - left if short else 0)

    def _by_length(self, order: torch.Tensor, lengths: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Sort within windows, then order whole batches at random, the longest first."""
        windows = torch.split(order, WINDOW * self.block)
        batches = [
            b for w in windows for b in torch.split(w[lengths[w].argsort(descending=True, stable=True)], self.block)
        ]
        whole = [b for b in batches if len(b) == self.block]
        rest = [b for b in batches if len(b) < self.block]  # at most one, which stays last
        if not whole:
            return order
        whole = [whole[i] for i in torch.randperm(len(whole), generator=generator)]
        longest = max(range(len(whole)), key=lambda i: int(lengths[whole[i]].max()))
        whole.insert(0, whole.pop(longest))
        return torch.cat(whole + rest)


class Loader(DataLoader[Any]):
    """A DataLoader whose workers are not ended by a SIGTERM to the whole process group or job, as SLURM and `timeout`
    send it: the fit could not finish its step and save. That of their own process ends them.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if getattr(self.worker_init_fn, "func", None) is not _start_worker:  # Lightning may have put its own there
            self.worker_init_fn = partial(_start_worker, self.worker_init_fn)
        return super().__iter__()


def _start_worker(init: Callable[[int], None] | None, worker: int) -> None:
    if init is not None:
        init(worker)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, daemon=True).start()


def _end_by_parent() -> None:
    parent = os.getppid()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # as torch's own handler does


class ResumableLoader(Loader):
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
        return dict(getattr(self.sampler, "identity", {"sampler": type(self.sampler).__name__}))

    def _skip_to_place(self) -> int:
        """Let the sampler skip to the loaded position, if it is in the epoch that begins and the order is the same."""
        state, sampler = self._loaded_state, self.sampler
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


class StreamLoader(Loader):
    """A loader that skips what was trained on before, and sets the epoch of a stream that shuffles.

    A stream cannot begin in its middle, and a worker does not know its earlier batches: they are made again and
    discarded.

    Args:
        stream: the same rows each time, apart from the epoch.
        trainer: the training's; None in evaluation.
        ends: whether each epoch begins the stream anew. A stream without an end goes on over epochs.
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
        self._was = dict(state_dict)


def seeded_generator(seed: int) -> torch.Generator:
    """A loader's generator: each iteration takes a seed for its workers, by default from the global generator.

    How often that happens depends on whether workers persist, and so on where a fit was interrupted.
    """
    return torch.Generator().manual_seed(seed)
