"""DataModules over any torch `Dataset`, and sets of the Hugging Face hub as such datasets, streamed or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from lora_lightning.backbones.locate import resolve
from lora_lightning.data.base import LoadsSets
from lora_lightning.data.io.tables import check_names, is_saved
from lora_lightning.lora.errors import LoRAError, did_you_mean, first_line


class DatasetData(LoadsSets):
    """Batches of datasets that a config names by `class_path`.

    A dataset with a length is shuffled in training by (seed, epoch) and divided among processes, as in every DataModule
    here. A stream (`IterableDataset`) keeps its order: each process and worker takes its share, unless the stream
    divides itself.

    Args:
        train: examples to train on: a mapping of names to tensors each, or (inputs, target).
        validation: to validate on, if any.
        test: to test on, if any.
        predict: to predict on; `test` by default.
        batch_size: examples per batch and process in training.
        eval_batch_size: the same in evaluation; `batch_size` by default.
        collate_fn: from a list of examples to a batch; torch's by default, which stacks tensors.
        num_workers: processes that prepare batches.
        shuffle: take a new order each epoch; not of streams, which shuffle themselves.
        stream_shares_itself: a stream gives each process and worker its part already.
        pin_memory: put batches into pinned memory, which a GPU copies faster.
        drop_last: leave out the last batch in training where it is smaller.
        seed: of the order in training.
    """

    def __init__(
        self,
        # Without type arguments: jsonargparse does not build a class path for Dataset[Any].
        train: Dataset | None = None,  # type: ignore[type-arg]
        validation: Dataset | None = None,  # type: ignore[type-arg]
        test: Dataset | None = None,  # type: ignore[type-arg]
        predict: Dataset | None = None,  # type: ignore[type-arg]
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        shuffle: bool = True,
        stream_shares_itself: bool = False,
        pin_memory: bool = False,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        self.sets = {"train": train, "validation": validation, "test": test, "predict": predict or test}
        self.collate_fn, self.shuffle, self.stream_shares_itself = collate_fn, shuffle, stream_shares_itself
        self.pin_memory, self.drop_last = pin_memory, drop_last

    @property
    def collate(self) -> Callable[[list[Any]], Any] | None:
        return self.collate_fn

    @property
    def has_validation(self) -> bool:
        return self.sets["validation"] is not None

    @property
    def data_summary(self) -> dict[str, Any]:
        """The number of examples of each set with a length."""
        sets: dict[str, Any] = self.sets
        return {"rows": {split: len(data) for split, data in sets.items() if isinstance(data, Sized)}}

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loaders("train")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loaders("predict")

    def _loaders(self, split: str) -> DataLoader[Any]:
        data, training = self.sets[split], split == "train"
        if data is None:
            raise LoRAError(f"there is no {split} set: give data.init_args.{split} a class_path")
        options: dict[str, Any] = {"pin_memory": self.pin_memory, "drop_last": self.drop_last and training}
        if isinstance(data, IterableDataset):
            world = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
            data = data if self.stream_shares_itself else Share(data, *world, even=training)
        elif isinstance(data, Sized) and not len(data):
            raise LoRAError(f"the {split} set is empty")
        return self._loader(data, training=training, shuffle=self.shuffle, **options)


class Share(IterableDataset[Any]):
    """This process's and worker's share of a stream: every n-th example.

    Args:
        even: leave out an incomplete last round, so that all have equally many: in training they wait for each other.
    """

    def __init__(self, data: IterableDataset[Any], world_size: int = 1, rank: int = 0, *, even: bool = False) -> None:
        super().__init__()
        self.data, self.world_size, self.rank, self.even = data, world_size, rank, even

    def __iter__(self) -> Iterator[Any]:
        worker = None if isinstance(self.data, Stream | datasets.IterableDataset) else get_worker_info()
        # (datasets' streams give each worker its part already)
        workers, worker_id = (1, 0) if worker is None else (worker.num_workers, worker.id)
        total, place = self.world_size * workers, self.rank * workers + worker_id
        stream = iter(self.data)
        while turn := list(islice(stream, total)):
            if len(turn) < total and self.even and self.world_size > 1:
                return
            if place < len(turn):
                yield turn[place]

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch to a stream that shuffles by it."""
        if callable(method := getattr(self.data, "set_epoch", None)):
            method(epoch)


def hub_dataset(
    path: str,
    split: str = "train",
    name: str | None = None,
    columns: dict[str, str] | None = None,
    transform: Callable[[dict[str, Any]], Any] | None = None,
    streaming: bool = False,
    shuffle_buffer: int = 0,
    seed: int = 0,
    revision: str | None = None,
) -> Dataset:  # type: ignore[type-arg]
    """A set by its name on the Hugging Face hub, or from a directory that `save_to_disk` made, as a torch `Dataset`.

    Args:
        path: a hub name, a directory, or `package:NAME/path` inside an installed package.
        split: the split, also a slice of it such as `train[:10%]`.
        name: the configuration of the set.
        columns: columns to keep, with their names in an example: `{text: sentence}` takes the column `text` as
            `sentence`. All, unchanged, by default.
        transform: a function of one example, whose results are collated.
        streaming: read examples as they are needed and keep nothing on disk; such a set has no length.
        shuffle_buffer: of a stream, the number of examples among which the next is chosen; 0 keeps its order.
        seed: of that shuffle.
        revision: branch, tag or commit on the hub.
    """
    data = _load(path, split, name, streaming, revision)
    if data.column_names:  # which not every stream knows
        check_names(data.column_names, list(columns or ()), f"'{path}'")
    if columns:
        data = data.select_columns(list(columns))
        data = data.rename_columns({old: new for old, new in columns.items() if old != new})
    if shuffle_buffer and streaming:
        data = data.shuffle(seed=seed, buffer_size=shuffle_buffer)
    return (Stream if streaming else Rows)(data.with_format("torch"), transform)


class Rows(Dataset[Any]):
    """A Hugging Face set with a length, each row through a function."""

    def __init__(self, data: datasets.Dataset, transform: Callable[[dict[str, Any]], Any] | None = None) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        row = self.data[int(index)]
        return row if self.transform is None else self.transform(row)


class Stream(IterableDataset[Any]):
    """A Hugging Face stream, each row through a function."""

    def __init__(self, data: Any, transform: Callable[[dict[str, Any]], Any] | None = None) -> None:
        super().__init__()
        self.data, self.transform = data, transform

    def __iter__(self) -> Iterator[Any]:
        for row in self.data:
            yield row if self.transform is None else self.transform(row)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for this epoch."""
        self.data.set_epoch(epoch)


def _load(path: str, split: str, name: str | None, streaming: bool, revision: str | None) -> Any:
    location = resolve(path)
    if is_saved(Path(location)):
        loaded = datasets.load_from_disk(location)
        splits: Mapping[Any, Any] = loaded if isinstance(loaded, Mapping) else {split: loaded}
        if split not in splits:
            held = ", ".join(splits)
            raise LoRAError(f"'{path}' has no split '{split}'{did_you_mean(split, list(splits))} (it has {held})")
        return splits[split].to_iterable_dataset() if streaming else splits[split]
    try:
        return datasets.load_dataset(location, name, split=split, streaming=streaming, revision=revision)
    except Exception as error:  # many kinds: no network, no such set, no such split
        raise LoRAError(f"no set '{path}' with a split '{split}': {first_line(error)}") from error
