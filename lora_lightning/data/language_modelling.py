"""Texts for next-token prediction, one document per row, packed or not, as a table or a stream.

A stream's rows are shuffled within a buffer, tokenized and packed while they are read. Training's stream has no end:
after its last row it begins again in another order, and `trainer.max_steps` says when to stop. N processes share a
stream by datasets' `split_dataset_by_node`. An endless stream without a file for each process is shared by turns, which
go on over its ends, so that N processes equal one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property
from itertools import count, islice
from typing import Any

import datasets
from datasets.distributed import split_dataset_by_node
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase

from lora_lightning.data.io.splits import kind_of, rename_first_sets
from lora_lightning.data.io.tables import ROW, TextBy, check_names, lengths_of, read_tables, values_of
from lora_lightning.data.loading.packing import cut, cut_to_train, pack_rows, pack_table
from lora_lightning.data.text import GivesPrompts, Prompt, beginning_of
from lora_lightning.lora.errors import LoRAError, first_few, first_line
from lora_lightning.tasks.losses.linear_cross_entropy import IGNORED

DOCUMENT = "document"
"""The column with the row's number in its file, counted from 1, also for a piece of it."""
IN_PIECES = "documents in pieces"


class LanguageModellingData(GivesPrompts):
    """Texts of files or of a Hugging Face set, one document per row, to batches for `CausalLM`.

    Each document ends with the tokenizer's end of text. One that is longer than `max_length` is cut into pieces, so
    that no token is lost. Packed, several documents share a row and do not attend to each other; loss and gradients
    equal those of separate rows, with less padding. For `predict` each piece is a row.

    Args:
        text_column: the text; of a .txt it is `text`.
        text_by: the documents of a .txt: each `line`, each `paragraph` between blank lines, or the whole `document`.
        max_length: tokens per row at most.
        packing: put several documents into one row.
        end_of_text: end each document with the tokenizer's end-of-text token, so that the model learns to stop.
        streaming: read the set as it is needed, again and again up to `trainer.max_steps`. No splits are split off.
            Rows of `predict` are read as a table in any case.
        shuffle_buffer: documents in memory among which a stream is shuffled.
        batch_size: rows per batch and process in training.
        texts: arguments of `TextData`.
    """

    cut_by: Mapping[str, str | None] = {IN_PIECES: None}
    least_length = 2  # one token to tell the next one from
    predicts_rows = False  # it predicts pieces of documents, each with the number of its `document`

    def __init__(
        self,
        *texts: Any,
        text_column: str = "text",
        text_by: TextBy = "line",
        max_length: int = 1024,
        packing: bool = True,
        end_of_text: bool = True,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        batch_size: int = 8,
        **table: Any,
    ) -> None:
        super().__init__(*texts, max_length=max_length, batch_size=batch_size, **table)
        self.streaming, self.shuffle_buffer = streaming, shuffle_buffer
        self.text_column, self.text_by, self.packing, self.end_of_text = text_column, text_by, packing, end_of_text
        self.input_columns = [text_column]

    def filter(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        """Drop blank texts, such as those between the paragraphs of a .txt."""
        rows = [i for i, text in enumerate(values_of(table, self.text_column)) if text.strip()]
        return table if len(rows) == len(table) else table.select(rows)

    def encode(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        if split == "predict":
            return self._cut(self.documents(table, split), split)
        documents = self.documents(table, split, trainable=True)
        if not len(documents):
            raise LoRAError(f"{self.place(split)}: no row has two tokens, so there is nothing to train on")
        if left_out := sorted({*values_of(table, ROW)} - {*values_of(documents, DOCUMENT)}):
            rank_zero_warn(
                f"{self.place(split)}: {len(left_out)} of {len(table)} rows have a single token, of which nothing"
                f" can be learnt, and are left out: row {first_few(list(map(str, left_out)))}"
            )
        longer = [length > self.max_length for length in lengths_of(documents)]
        self.cut_shares[split] = {IN_PIECES: sum(longer) / len(longer)}
        if self.packing:
            return pack_table(documents, self.max_length, split)
        return self._cut(documents, split, cut_to_train).remove_columns(DOCUMENT)

    def documents(self, table: datasets.Dataset, split: str, *, trainable: bool = False) -> datasets.Dataset:
        """Each row's whole `input_ids` and `labels`, and its number in its file; if asked, without single tokens."""
        return self.encode_by(encode_texts, table, split, trainable=trainable, **self._options())

    def _options(self) -> dict[str, Any]:
        end = self.tokenizer.eos_token_id if self.end_of_text else None
        if self.end_of_text and end is None:
            who = f"the tokenizer '{self.tokenizer_name}'"
            raise LoRAError(f"{who} has no end-of-text token: set data.init_args.end_of_text to false")
        return {"tokenizer": self.tokenizer, "column": self.text_column, "end": end}

    def _cut(
        self, documents: datasets.Dataset, split: str, cut: Callable[..., dict[str, list[Any]]] = cut
    ) -> datasets.Dataset:
        return documents.map(cut, batched=True, fn_kwargs={"max_length": self.max_length}, desc=f"cut {split}")

    @cached_property
    def streams(self) -> dict[str, datasets.IterableDataset]:
        """Encoded rows by split, opened on first use."""
        opened = read_tables(self.path, self.name, self.text_by, streaming=True)
        named = rename_first_sets(list(opened))
        self._original_names = {new: old for old, new in named.items()}
        renamed = {named.get(split, split): stream for split, stream in opened.items()}
        return {split: self._prepare_stream(stream, split) for split, stream in renamed.items()}

    @property
    def splits(self) -> Collection[str]:
        return self.streams if self.streaming else self.tables

    def _prepare_stream(self, stream: datasets.IterableDataset, split: str) -> datasets.IterableDataset:
        names = list(first_row(stream, self.place(split)))
        check_names(names, self.columns(split), self.place(split), vars(self))
        stream = stream.map(with_number, with_indices=True)
        if split == "train":
            stream = stream.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        return self.encode_stream(stream, names, split)

    def encode_stream(self, stream: datasets.IterableDataset, names: list[str], split: str) -> datasets.IterableDataset:
        batches, of_rows = {"batched": True, "batch_size": AT_ONCE}, {"max_length": self.max_length}
        of_texts = {**self._options(), "place": self.place(split), "trainable": True}
        stream = stream.map(encode_texts, remove_columns=[*names, ROW], fn_kwargs=of_texts, **batches)
        into_rows = pack_rows if self.packing else cut_to_train
        return stream.map(into_rows, remove_columns=[DOCUMENT], fn_kwargs=of_rows, **batches)

    def encoded_rows(self, split: str) -> Any:
        if not self.streaming:
            return super().encoded_rows(split)
        self._encoded |= self.streams
        return share_of(super().encoded_rows(split), self.trainer)

    def train_dataloader(self) -> DataLoader[Any]:
        if not self.streaming:
            return super().train_dataloader()
        trainer = self.trainer
        if trainer is not None and trainer.max_steps == -1:
            raise LoRAError("a stream has no end: set trainer.max_steps to the number of optimizer steps to train for")
        validates = trainer is not None and self.has_validation and trainer.limit_val_batches
        if validates and not isinstance(trainer.val_check_interval, int):  # type: ignore[union-attr]
            raise LoRAError(
                "a stream has no end at which to validate: set trainer.val_check_interval to a number of batches, or"
                " trainer.limit_val_batches to 0"
            )
        _ = self.encoded_rows("train")  # raises where there is none
        return self._loader(endless(self.streams["train"], self.trainer), training=True, ends=False)

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Pieces of documents in the order of the file, never packed and never streamed."""
        tables = sorted(self.tables, key=lambda name: "_" in name)  # the first set, then those of a name
        predict, test = ([name for name in tables if kind_of(name) == kind] for kind in ("predict", "test"))
        names = predict or test
        if not names:
            self.encoded_rows("test")  # says what is missing
        pieces = [self._cut(self.documents(self.tables[name], name), name) for name in names]
        loaders = [self._loader(table) for table in pieces]
        return loaders if len(loaders) > 1 else loaders[0]

    def held_out_rows(self, count: int) -> Any:
        if not self.streaming:
            return super().held_out_rows(count)
        streams = read_tables(self.path, self.name, self.text_by, streaming=True)
        return next(streams[name] for name in ("validation", "test", "train") if name in streams).take(count)

    def prompt_of(self, row: dict[str, Any]) -> Prompt:
        return beginning_of(row[self.text_column], self.tokenizer)


def encode_texts(
    rows: dict[str, list[Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    column: str,
    end: int | None,
    trainable: bool,
    place: str = "",
) -> dict[str, Any]:
    """Token ids of whole texts, each with `end` behind it; all but the first are trained on.

    `trainable` leaves out texts that are blank or of a single token, which nothing predicts.
    """
    for number, text in zip(rows[ROW], rows[column], strict=True):
        if not isinstance(text, str):
            raise LoRAError(f"{place}, row {number}, column '{column}': expected text, got {text!r:.80}")
    encoded: dict[str, Any] = {"input_ids": [], "labels": [], DOCUMENT: []}
    every = tokenizer(rows[column], verbose=False)["input_ids"]  # without warnings about long texts
    for number, text, plain in zip(rows[ROW], rows[column], every, strict=True):
        ids = [*plain, end] if end is not None and plain[-1:] != [end] else plain
        if not trainable or (text.strip() and len(ids) > 1):
            for values, value in zip(encoded.values(), (ids, [IGNORED, *ids[1:]], number), strict=True):
                values.append(value)
    return encoded


AT_ONCE = 1000
"""Rows that are tokenized and packed together."""


def with_number(row: dict[str, Any], i: int) -> dict[str, Any]:
    """The row with its number in its file, counted from 1."""
    return {**row, ROW: i + 1}


def share_of(stream: datasets.IterableDataset, trainer: Trainer | None) -> datasets.IterableDataset:
    """This process's share of a stream."""
    if trainer is None or trainer.world_size == 1:
        return stream
    return split_dataset_by_node(stream, rank=trainer.global_rank, world_size=trainer.world_size)


def endless(stream: datasets.IterableDataset, trainer: Trainer | None) -> Endless:
    """This process's share of a stream without end."""
    if trainer is None or stream.num_shards % trainer.world_size == 0:  # equally many files for all: none is read twice
        return Endless(share_of(stream, trainer))
    return Endless(stream, trainer.global_rank, trainer.world_size)


class Endless(IterableDataset[Any]):
    """A stream that is repeated without end, a shuffled one in another order each time.

    Processes take turns in one order, also over the ends of the stream.
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
