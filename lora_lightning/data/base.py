"""The base of DataModules over tables: reading, checking, splitting, encoding, and loaders in a reproducible order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import datasets
import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from lora_lightning.data.io.splits import SplitConfig, kind_of, rename_first_sets, split_rows
from lora_lightning.data.io.summary import summarize
from lora_lightning.data.io.tables import (
    ROW,
    Readers,
    TextBy,
    check_names,
    doubled_columns,
    lengths_of,
    read_tables,
    source_of,
    values_of,
)
from lora_lightning.data.loading.sampler import EpochSampler, Loader, ResumableLoader, StreamLoader, seeded_generator
from lora_lightning.lora.errors import LoRAError

MOST_SHOWN = 80
"""Characters at most of a faulty value in an error."""


VERSION = 2
"""Of the encoding functions: `datasets` caches by a function's name. Raise it when a function's result changes."""


def encode_batch(rows: Any, *, function: Callable[..., Any], version: int, **options: Any) -> Any:
    """A batch of rows through an encoding function."""
    return function(rows, **options)


class LoadsSets(LightningDataModule, ABC):
    """Loaders of tables and streams, in an order of (seed, epoch) that processes share and a resumed fit keeps."""

    def __init__(self, batch_size: int, eval_batch_size: int | None, num_workers: int, seed: int) -> None:
        super().__init__()
        for what, number in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size or batch_size)):
            if number < 1:
                raise LoRAError(f"{what} must be at least 1, got {number}")
        if num_workers < 0:
            raise LoRAError(f"num_workers must be at least 0 (none beside this process), got {num_workers}")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.seed = num_workers, seed

    @property
    @abstractmethod
    def collate(self) -> Callable[[list[Any]], Any] | None:
        """Encoded rows to a batch: a mapping of names to tensors."""

    @property
    @abstractmethod
    def has_validation(self) -> bool:
        """Whether there is a validation set."""

    @abstractmethod
    def _loaders(self, split: str) -> DataLoader[Any] | list[Any]:
        """Return the loader of a split, or one for each of its sets where it has several."""

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        fitting = self.trainer is None or str(self.trainer.state.fn) != "validate"
        return [] if fitting and not self.has_validation else self._loaders("validation")

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._loaders("test")

    def _loader(
        self,
        data: Any,
        *,
        training: bool = False,
        shuffle: bool = True,
        lengths: list[int] | None = None,
        order: type[EpochSampler] = EpochSampler,
        ends: bool = True,
        **options: Any,
    ) -> DataLoader[Any]:
        """Return a loader of rows or of this process's share of a stream; see `EpochSampler` and `StreamLoader`."""
        trainer, batch_size = self.trainer, self.batch_size if training else self.eval_batch_size
        options = {"batch_size": batch_size, "num_workers": self.num_workers, "collate_fn": self.collate, **options}
        options["generator"] = seeded_generator(self.seed)
        if isinstance(data, IterableDataset):  # its workers do not persist: a new one knows the epoch
            return StreamLoader(data, trainer if training else None, ends=ends, **options)
        world = {} if trainer is None else {"num_replicas": trainer.world_size, "rank": trainer.global_rank}
        shuffle = training and shuffle
        sampler = order(data, batch_size=batch_size, lengths=lengths, shuffle=shuffle, seed=self.seed, **world)
        loader = ResumableLoader if training else Loader
        return loader(data, sampler=sampler, persistent_workers=self.num_workers > 0, **options)


class TableData(LoadsSets):
    """Rows of files or of a Hugging Face set to batches. A subclass defines the columns of a row and its encoding.

    In order: `read`, `check`, `check_targets` and `filter` of each split, the missing splits, `encode` of each split
    once. A missing file or column, and a wrong value, raise a LoRAError with file, row and column.

    Args:
        path: a file (CSV, TSV, JSONL, Parquet, also compressed), files by split, a directory, or a set on the hub;
            `package:NAME/path` is a file inside an installed package.
        name: which configuration of a hub set.
        split: how to split off validation and test where the set has none.
        batch_size: examples per batch and process in training.
        eval_batch_size: the same in evaluation; `batch_size` by default.
        length_grouped: put examples of similar length into one batch, which pads less.
        num_workers: processes that prepare batches.
        num_proc: processes that encode the rows once before training; only this one by default.
        seed: of the order in training.
    """

    train_sampler: type[EpochSampler] = EpochSampler
    """The class that sets the order of rows in training."""
    readers: Readers | None = None
    """Readers of files by suffix, beside or in place of the usual ones."""
    text_by: TextBy = "line"
    """The rows of a .txt."""
    input_columns: Sequence[str | None] = ()
    """Columns that a model reads; None is a column that is not used."""
    target_columns: Sequence[str | None] = ()
    """Columns of what it learns, which rows to predict on need not have."""
    cut_by: Mapping[str, str | None] = {}
    """Options that cut texts, by kind of cut, where it is not `max_length`; None where a cut loses nothing."""
    streaming: bool = False
    """Whether the sets are read while they are trained on, by a subclass that can."""
    predicts_rows: bool = True
    """Whether there is one prediction for each row of the table, in its order."""

    def __init__(
        self,
        path: str | dict[str, str],
        name: str | None = None,
        split: SplitConfig = SplitConfig(),  # noqa: B008  (frozen)
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        length_grouped: bool = True,
        num_workers: int = 0,
        num_proc: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        self.path, self.name, self.split = path, name, split
        self.length_grouped, self.num_proc = length_grouped, num_proc
        self._encoded: dict[str, datasets.Dataset] = {}
        self.cut_shares: dict[str, dict[str, float]] = {}  # by split and kind, such as `sources cut`
        self._original_names: dict[str, str] = {}
        self.given_splits: frozenset[str] = frozenset()
        self.doubled_columns: dict[str, list[str]] = {}

    def read(self) -> dict[str, datasets.Dataset]:
        """Tables by split, as they are in the files."""
        return read_tables(self.path, self.name, self.text_by, self.readers)

    def columns(self, split: str) -> Sequence[str | None]:
        """Columns that a table must have."""
        return [*self.input_columns, *([] if kind_of(split) == "predict" else self.target_columns)]

    def check(self, table: datasets.Dataset, split: str) -> None:
        """Raise for a wrong value in a row; `bad_cell` makes the error."""

    def check_targets(self, table: datasets.Dataset, split: str) -> None:
        """Raise for a wrong target; not called for rows to predict on."""

    def filter(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        """The rows that are used; not called for rows to predict on, which are all used."""
        return table

    @abstractmethod
    def encode(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        """Encoded rows, ready to be collated. Columns such as `source_cut`, which say what was cut, are taken out."""

    def lengths(self, table: datasets.Dataset) -> list[int] | None:
        """Return the length of each encoded row, to group by; None where rows have none."""
        return lengths_of(table) if "input_ids" in table.column_names else None

    def encoded_lengths(self) -> dict[str, list[int]]:
        """Return each encoded row's tokens by split, of several texts the largest; not for packed rows."""
        lengths = {}
        for split, table in self._encoded.items():
            names = table.column_names if isinstance(table, datasets.Dataset) else []
            columns = [] if "position_ids" in names else [name for name in names if name.endswith("input_ids")]
            if columns:
                lengths[split] = np.max([lengths_of(table, column) for column in columns], axis=0).tolist()
        return lengths

    def read_off_train(self) -> dict[str, Any]:
        """Return arguments that were read from training rows, such as label names, so that `predict` needs none."""
        return {}

    @cached_property
    def tables(self) -> dict[str, datasets.Dataset]:
        """Checked and filtered rows by split, read on first use. The column `ROW` is each row's number in its file."""
        tables = self.read()
        self.given_splits, self.doubled_columns = frozenset(tables), doubled_columns(self.path)
        for split, table in tables.items():
            with self._kind_of_set(split) as kind:
                tables[split] = self._checked(table, kind)
        named = rename_first_sets(list(tables))
        self._original_names = {new: old for old, new in named.items()}
        return self._with_splits({named.get(split, split): table for split, table in tables.items()})

    def _checked(self, table: datasets.Dataset, kind: str) -> datasets.Dataset:
        """The rows of a set that are used, with their numbers in the column `ROW`; a wrong one is refused."""
        if ROW not in table.column_names:
            table = table.add_column(ROW, np.arange(1, len(table) + 1))
        columns, place = self.columns(kind), self.place(kind)
        check_names(table.column_names, columns, place, vars(self))
        if double := set(self.doubled_columns.get(self._original_names[kind], ())) & set(columns):
            raise LoRAError(f"{place}: the header has the column '{min(map(str, double))}' twice: rename one")
        self.check(table, kind)
        if kind == "predict":
            return table
        self.check_targets(table, kind)
        for names in self.text_columns(table, kind) if len(table) else ():
            of_texts = names and all(table.features[name] == datasets.Value("string") for name in names)
            if of_texts and not any(text and text.strip() for name in names for text in values_of(table, name)):
                raise LoRAError(f"{place}: expected texts in column '{names[0]}', all are blank")
        return self.filter(table, kind)

    @cached_property
    def data_summary(self) -> dict[str, Any]:
        """Counts and warnings as plain data, computed once after `setup`, none of a stream. See `summarize`."""
        return {} if self.streaming else summarize(self)

    def label_counts(self, split: str) -> dict[str, int]:
        """Number of rows of each label in an encoded split; empty without labels."""
        return {}

    def text_columns(self, table: datasets.Dataset, split: str) -> tuple[list[str], list[str]]:
        """Columns whose texts a model reads, and columns whose texts it writes."""
        return [column for column in self.columns("predict") if column is not None], []

    def without_cuts(self, encoded: datasets.Dataset, split: str) -> datasets.Dataset:
        """Drop the columns `source_cut` and so on of encoded rows, and keep the shares in `cut_shares`."""
        names = [name for name in encoded.column_names if name.endswith("_cut")]
        shares = {f"{name.removesuffix('_cut')}s cut": float(np.mean(list(values_of(encoded, name)))) for name in names}
        if names and split != "predict":
            self.cut_shares[split] = shares
        return encoded.remove_columns(names)

    def sets(self, split: str) -> list[str]:
        """All sets of a split, `split` itself first: `[validation, validation_mismatched]`.

        Their loaders come in this order. The first one's figures are logged as `val/...` and choose the best
        checkpoint, those of `validation_mismatched` as `val_mismatched/...`.
        """
        further = [name for name in self.splits if name.startswith(f"{split}_")]
        return [split, *further] if split in self.splits else []

    @property
    def splits(self) -> Collection[str]:
        """The names of all sets."""
        return self.tables

    def rows_of(self, split: str) -> int | None:
        """The number of rows of all sets of a split; None where it is unknown before they are read."""
        return None if self.streaming else sum(len(self.tables[name]) for name in self.sets(split))

    def columns_to_join(self, index: int, wanted: Sequence[str] | None = None) -> dict[str, list[Any]]:
        """The columns that are written beside predictions on this set: `wanted`, `all`, or `id` if any."""
        names = (self.sets("predict") or self.sets("test"))[index:]
        if not names or (wanted is None and not self.predicts_rows):
            return {}
        table, place = self.tables[names[0]], self.place(names[0])
        columns = [name for name in table.column_names if name != ROW]
        if wanted is None:
            wanted = [name for name in columns if name == "id"]
        wanted = columns if list(wanted) == ["all"] else wanted
        check_names(table.column_names, wanted, place)
        if wanted and (not self.predicts_rows or len(self._encoded.get(names[0], table)) != len(table)):
            raise LoRAError(f"{place}: rows are cut or left out, so that columns cannot stand beside predictions")
        return {name: list(values_of(table, name)) for name in wanted}

    def prepare_data(self) -> None:
        """Read once in one process, so that the others find everything cached; a stream is not."""
        _ = self.streaming or self.tables

    def setup(self, stage: str | None = None) -> None:
        """Encode each split once; a stream is encoded while it is read."""
        for split, table in () if self.streaming else self.tables.items():
            if split not in self._encoded:
                with self._kind_of_set(split) as kind:
                    encoded = self.encode(table, kind)
                    is_table = isinstance(encoded, datasets.Dataset)
                    self._encoded[split] = self.without_cuts(encoded, kind) if is_table else encoded

    @contextmanager
    def _kind_of_set(self, split: str) -> Iterator[str]:
        """Yield the set's kind, which is `predict` for each set to predict on; within the block errors name the set."""
        called, kind = self._original_names, "predict" if split.startswith("predict_") else split
        self._original_names = {**called, kind: called.get(split, split)}
        try:
            yield kind
        finally:
            self._original_names = called

    def train_dataloader(self) -> DataLoader[Any]:
        table = self.encoded_rows("train")
        lengths = self.lengths(table) if self.length_grouped else None
        return self._loader(table, training=True, lengths=lengths, order=self.train_sampler)

    @property
    def has_validation(self) -> bool:
        return "validation" in self.splits

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._loaders("predict" if "predict" in self._encoded else "test")

    def _loaders(self, split: str) -> DataLoader[Any] | list[Any]:
        loaders = [self._loader(self.encoded_rows(name)) for name in self.sets(split) or [split]]
        return loaders if len(loaders) > 1 else loaders[0]

    def every(self, split: str) -> DataLoader[Any]:
        """All rows of a split, longest first, in this process alone: for computing features, not for training."""
        table = self.encoded_rows(split)
        lengths = self.lengths(table)
        if lengths is not None:
            table = table.select(sorted(range(len(table)), key=lengths.__getitem__, reverse=True))
        return DataLoader(table, batch_size=self.eval_batch_size, collate_fn=self.collate)  # type: ignore[arg-type]

    def place(self, split: str) -> str:
        """Return a split's name with its file, for errors."""
        split = self._original_names.get(split, split)
        return f"{source_of(self.path, split, self.readers)}, the {split} set"

    def bad_cell(self, split: str, row: int, column: str, expected: str, got: object, hint: str = "") -> LoRAError:
        """Return the error for a value of a row, counted from 1 as in its file. `hint` follows the value."""
        shown = repr(got)
        shown = shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]}..."
        return LoRAError(f"{self.place(split)}, row {row}, column '{column}': expected {expected}, got {shown}{hint}")

    def check_cells(
        self,
        table: datasets.Dataset,
        split: str,
        columns: Iterable[str | None],
        expected: str,
        is_right: Callable[[Any], object],
        skip: Sequence[bool] = (),
    ) -> None:
        """Raise for a value of these columns that is not right; not in rows to `skip`."""
        for column in filter(None, columns):
            for i, value in enumerate(values_of(table, column)):
                if not is_right(value) and not (skip and skip[i]):
                    raise self.bad_cell(split, table[ROW][i], column, expected, value)

    def check_texts(
        self, table: datasets.Dataset, split: str, columns: Iterable[str | None], *, blank: bool = True, **skip: Any
    ) -> None:
        """The same for a value that is no text or, unless `blank`, has no words."""
        expected = "text" if blank else "a text with words in it"
        is_right = lambda value: isinstance(value, str) and (blank or value.strip())  # noqa: E731
        self.check_cells(table, split, columns, expected, is_right, **skip)

    def encoded_rows(self, split: str) -> datasets.Dataset:
        """Return a split's encoded rows; a set without the split is refused."""
        if split not in self._encoded:
            raise LoRAError(f"the set has no {split} split: name its file in data.path, or give data.split a share")
        return self._encoded[split]

    def encode_by(
        self, function: Callable[..., Any], table: datasets.Dataset, split: str, **options: Any
    ) -> datasets.Dataset:
        """`table.map` in batches, cached by the rows and the options, which datasets pickles with the function."""
        options |= {"function": function, "version": VERSION}
        described = {"remove_columns": table.column_names, "desc": f"encode {split}"}
        return table.map(encode_batch, batched=True, fn_kwargs=options, num_proc=self.num_proc, **described)

    def _with_splits(self, tables: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
        """Split off the missing ones of validation and test from train."""
        shares = {n: 0.0 if n in tables else getattr(self.split, n) for n in ("validation", "test")}
        if not any(shares.values()) or "train" not in tables:
            return tables
        check_names(tables["train"].column_names, [self.split.group_by], self.place("train"))
        by, numbers = self.split.group_by, dict[int, int]()
        groups = list(values_of(tables["train"], by or ROW))
        if by is None:  # rows of one row of the file, such as a source with several targets, stay together
            groups = [numbers.setdefault(row, len(numbers)) for row in groups]
        try:
            rows = split_rows(groups, SplitConfig(**shares, group_by=by, seed=self.split.seed))
        except LoRAError as error:
            raise LoRAError(f"{self.place('train')}: {error}") from error
        return tables | {split: tables["train"].select(np.array(numbers, dtype=int)) for split, numbers in rows.items()}
