"""Texts that may be streamed: what a `TextData` is where its rows are not all read first."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import datasets
from torch.utils.data import DataLoader

from lora_lightning.data.io.rows import ROW
from lora_lightning.data.io.splits import first_in_place
from lora_lightning.data.io.stream_loader import StreamLoader
from lora_lightning.data.io.streaming import endless, first_row, numbered, refuse_endless, share_of
from lora_lightning.data.io.tables import check_names
from lora_lightning.data.loading.loader import own_generator
from lora_lightning.data.text.base import TextData


class StreamedTextData(TextData):
    """A `TextData` that reads its rows as they are needed, where `streaming` is on.

    Its own splits are used as they are, and none is split off. Rows of `predict` are read as a table in any case.

    Args:
        path: as `TableData` takes it.
        tokenizer: a hub name, a directory or `package:NAME/path`.
        max_length: tokens per row at most.
        streaming: read rows as they are needed; training goes on to `trainer.max_steps`.
        shuffle_buffer: rows that training's stream is shuffled within, all held in memory.
        table: arguments of `TableData` by name.
    """

    def __init__(
        self,
        path: str | dict[str, str],
        tokenizer: str,
        max_length: int,
        streaming: bool,
        shuffle_buffer: int,
        **table: Any,
    ) -> None:
        super().__init__(path, tokenizer, max_length, **table)
        self.streaming, self.shuffle_buffer = streaming, shuffle_buffer
        self._streams: dict[str, datasets.IterableDataset] | None = None

    @abstractmethod
    def open(self) -> dict[str, datasets.IterableDataset]:
        """Streams by split, as they stand in the files."""

    @abstractmethod
    def encode_stream(self, stream: datasets.IterableDataset, names: list[str], split: str) -> datasets.IterableDataset:
        """Rows as they are collated into batches, checked on the way.

        Args:
            names: the stream's columns; another, `ROW`, has each row's number.
        """

    @property
    def streams(self) -> dict[str, datasets.IterableDataset]:
        """Encoded rows by split, opened on first use."""
        if self._streams is None:
            opened = self.open()
            named = first_in_place(list(opened))
            self._called = {new: old for old, new in named.items()}
            renamed = {named.get(split, split): stream for split, stream in opened.items()}
            self._streams = {split: self._prepared(stream, split) for split, stream in renamed.items()}
        return self._streams

    def sets(self, split: str) -> list[str]:
        if not self.streaming:
            return super().sets(split)
        further = [name for name in self.streams if name.startswith(f"{split}_")]
        return [split, *further] if split in self.streams else []

    def _prepared(self, stream: datasets.IterableDataset, split: str) -> datasets.IterableDataset:
        names = list(first_row(stream, self.place(split)))
        check_names(names, self.columns(split), self.place(split), vars(self))
        stream = numbered(stream, ROW)
        if split == "train":
            stream = stream.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        return self.encode_stream(stream, names, split)

    def rows_of(self, split: str) -> int | None:
        return None if self.streaming else super().rows_of(split)

    @property
    def data_summary(self) -> dict[str, Any]:
        """Nothing of a stream, which is not read before it is trained on."""
        return {} if self.streaming else super().data_summary

    def prepare_data(self) -> None:
        """Nothing is cached of a stream."""
        if not self.streaming:
            super().prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Streams are encoded on the way."""
        if not self.streaming:
            super().setup(stage)

    @property
    def has_validation(self) -> bool:
        return "validation" in self.streams if self.streaming else super().has_validation

    def train_dataloader(self) -> DataLoader[Any]:
        if not self.streaming:
            return super().train_dataloader()
        refuse_endless(self.trainer, validates=self.has_validation)
        if "train" not in self.streams:
            self.encoded("train")  # says what is missing
        rows = endless(self.streams["train"], self.trainer)
        return StreamLoader(rows, self.trainer, ends=False, batch_size=self.batch_size, **self._reading())

    def _loaders(self, split: str) -> DataLoader[Any] | list[Any]:
        if not self.streaming:
            return super()._loaders(split)
        given = {"batch_size": self.eval_batch_size, **self._reading()}
        loaders = [DataLoader(self._share(s), **given) for s in self.sets(split) or [split]]  # type: ignore[arg-type]
        return loaders if len(loaders) > 1 else loaders[0]

    def _share(self, split: str) -> datasets.IterableDataset:
        if split not in self.streams:
            self.encoded(split)  # says what is missing
        return share_of(self.streams[split], self.trainer)

    def _reading(self) -> dict[str, Any]:
        return {
            "collate_fn": self.collate,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "generator": own_generator(self.seed),
        }
