"""Texts, or pairs of texts, with one label each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerBase

from lora_lightning.data.rows import ROW, check_order, encode_rows, without_hidden_labels
from lora_lightning.data.sampler import EpochSampler
from lora_lightning.data.splits import SplitConfig, split_rows
from lora_lightning.data.tables import check_columns, read_tables
from lora_lightning.lora.errors import LoRAError, did_you_mean
from lora_lightning.paths import resolve


class TextClassificationData(LightningDataModule):
    """Files or a Hugging Face set to batches of token ids, attention masks and label numbers.

    Args:
        path: a file (CSV, TSV, JSONL, Parquet, also compressed), files by split, a directory, or a set on the hub;
            `package:NAME/path` is a file inside an installed package.
        tokenizer: a hub name, a directory or `package:NAME/path`.
        name: which configuration of a hub set.
        text_column: the text.
        text_pair_column: a second text, for sentence pairs.
        label_column: the label, a name or a number.
        label_names: names in the order of their numbers. By default the set's own, else the sorted values in train.
        drop_labels: rows with these labels are left out.
        drop_duplicates: keep the first of rows with the same text.
        min_words: leave out shorter texts.
        split: how to split off validation and test where the set has none.
        max_length: tokens per example at most; what is over is cut.
        batch_size: examples per batch and process in training.
        eval_batch_size: the same in evaluation; `batch_size` by default.
        length_grouped: put texts of like length into one batch, which pads less.
        num_workers: processes that prepare batches.
        seed: of the order in training.

    Raises:
        LoRAError: a missing file or column, an empty text or label, a label that training never saw.
    """

    def __init__(
        self,
        path: str | dict[str, str],
        tokenizer: str,
        name: str | None = None,
        text_column: str = "text",
        text_pair_column: str | None = None,
        label_column: str = "label",
        label_names: list[str] | None = None,
        drop_labels: list[str] | None = None,
        drop_duplicates: bool = False,
        min_words: int = 0,
        split: SplitConfig = SplitConfig(),  # noqa: B008  (frozen)
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        length_grouped: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.path, self.tokenizer_name, self.name = path, tokenizer, name
        self.text_column, self.text_pair_column, self.label_column = text_column, text_pair_column, label_column
        self.given_label_names = label_names
        self.drop_labels, self.drop_duplicates, self.min_words = set(drop_labels or ()), drop_duplicates, min_words
        self.split, self.max_length, self.seed = split, max_length, seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.length_grouped, self.num_workers = length_grouped, num_workers
        self._tables: dict[str, datasets.Dataset] | None = None
        self._label_names: list[str] | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._encoded: dict[str, datasets.Dataset] = {}

    @property
    def tables(self) -> dict[str, datasets.Dataset]:
        """Filtered rows by split, read on first use."""
        if self._tables is None:
            tables = read_tables(self.path, self.name)
            if "train" not in tables and not (self.given_label_names and "predict" in tables):
                raise LoRAError(
                    f"the set has no train split, only {', '.join(tables)}: labels are read off train; to predict"
                    " without it, give label_names"
                )
            tables = without_hidden_labels(tables, self.label_column)
            tables = {split: self._checked(table, split) for split, table in tables.items()}
            tables = {split: self._filtered(table, split) for split, table in tables.items()}
            self._tables = self._with_splits(tables)
        return self._tables

    @property
    def label_names(self) -> list[str]:
        """Names of the labels, in the order of their numbers."""
        if self._label_names is None:
            train = self.tables.get("train")
            feature = train.features[self.label_column] if train is not None else None
            if self.given_label_names:
                self._label_names = list(self.given_label_names)
                check_order(self._label_names, feature)
            elif isinstance(feature, datasets.ClassLabel):
                self._label_names = list(feature.names)
            else:
                self._label_names = [str(v) for v in sorted(set(self.tables["train"][self.label_column]))]
        return self._label_names

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return len(self.label_names)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Loaded on first use."""
        if self._tokenizer is None:
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(resolve(self.tokenizer_name))
            except (OSError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise LoRAError(f"no tokenizer '{self.tokenizer_name}': {reason}") from error
            if self._tokenizer.pad_token is None:
                self._tokenizer.pad_token = self._tokenizer.eos_token
        return self._tokenizer

    @property
    def pad_token_id(self) -> int | None:
        """The number that fills short texts up."""
        number = self.tokenizer.pad_token_id
        return None if number is None else int(number)

    def prepare_data(self) -> None:
        """Read once in one process, so that the others find everything cached."""
        _ = self.tables

    def setup(self, stage: str | None = None) -> None:
        """Tokenise each split once."""
        for split, table in self.tables.items():
            if split not in self._encoded:
                self._encoded[split] = self._encode(table, split)

    def train_dataloader(self) -> DataLoader[Any]:
        table = self._encoded["train"]
        lengths = [len(ids) for ids in table["input_ids"]] if self.length_grouped else None
        return self._loader(table, self.batch_size, shuffle=True, lengths=lengths)

    @property
    def has_validation(self) -> bool:
        """Whether there is anything to validate on."""
        return "validation" in self.tables

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        fitting = self.trainer is None or str(self.trainer.state.fn) != "validate"
        if fitting and not self.has_validation:
            return []
        return self._loader(self._need("validation"), self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(self._need("test"), self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Any]:
        split = "predict" if "predict" in self._encoded else "test"
        return self._loader(self._need(split), self.eval_batch_size)

    def every(self, split: str) -> DataLoader[Any]:
        """All rows of a split, longest first, in this process alone: for features and not for training."""
        table = self._need(split)
        lengths = [len(ids) for ids in table["input_ids"]]
        order = sorted(range(len(table)), key=lengths.__getitem__, reverse=True)
        collate: Callable[..., Any] = DataCollatorWithPadding(self.tokenizer)
        return DataLoader(table.select(order), batch_size=self.eval_batch_size, collate_fn=collate)  # type: ignore[arg-type]

    def majority_share(self, split: str) -> float:
        """Accuracy on `split` of always saying the label that is most common in train."""
        train = list(self._encoded["train"]["labels"])
        most_common = max(set(train), key=train.count)
        labels = list(self._need(split)["labels"])
        return labels.count(most_common) / len(labels)

    def _need(self, split: str) -> datasets.Dataset:
        if split not in self._encoded:
            raise LoRAError(f"the set has no {split} split: name its file in data.path, or give data.split a share")
        return self._encoded[split]

    def _loader(
        self, table: datasets.Dataset, batch_size: int, *, shuffle: bool = False, lengths: list[int] | None = None
    ) -> DataLoader[Any]:
        world = (
            {} if self.trainer is None else {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        )
        sampler = EpochSampler(table, batch_size=batch_size, lengths=lengths, shuffle=shuffle, seed=self.seed, **world)
        collate: Callable[..., Any] = DataCollatorWithPadding(self.tokenizer)
        return DataLoader(
            table,  # type: ignore[arg-type]
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _checked(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        """Raise where a column is missing, or a value of a row that is not dropped anyway."""
        labels = None if split == "predict" else self.label_column
        check_columns(table, [self.text_column, self.text_pair_column, labels], split)
        dropped = [labels is not None and str(label) in self.drop_labels for label in table[labels or self.text_column]]
        for column in filter(None, (self.text_column, self.text_pair_column, labels)):
            for row, (value, drop) in enumerate(zip(table[column], dropped, strict=True)):
                if drop or (value is not None and (column == labels or isinstance(value, str))):
                    continue
                expected = "a label" if column == labels else "text"
                raise LoRAError(
                    f"the {split} set, row {row + 1}, column '{column}': expected {expected}, got {value!r}"
                )
        return table if ROW in table.column_names else table.add_column(ROW, list(range(1, len(table) + 1)))

    def _filtered(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        if split == "predict":
            return table
        labels = [str(value) for value in table[self.label_column]]
        missing = self.drop_labels - set(labels)
        if split == "train" and missing:
            unknown = min(missing)
            raise LoRAError(f"drop_labels: no row is labelled '{unknown}'{did_you_mean(unknown, labels)}")
        seen: set[tuple[str, str | None]] = set()
        rows = []
        pairs = table[self.text_pair_column] if self.text_pair_column else [None] * len(table)
        for row, (text, pair, label) in enumerate(zip(table[self.text_column], pairs, labels, strict=True)):
            if label in self.drop_labels or len(text.split()) < self.min_words:
                continue
            if self.drop_duplicates and (text, pair) in seen:
                continue
            seen.add((text, pair))
            rows.append(row)
        if not rows:
            raise LoRAError(f"no row of the {split} set is left after drop_labels, drop_duplicates and min_words")
        return table if len(rows) == len(table) else table.select(rows)

    def _with_splits(self, tables: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
        """Split off what the set does not bring: both from train, or the one that is missing."""
        shares = {
            "validation": 0.0 if "validation" in tables else self.split.validation,
            "test": 0.0 if "test" in tables else self.split.test,
        }
        if not any(shares.values()) or "train" not in tables:
            return tables
        check_columns(tables["train"], [self.split.group_by], "train")
        groups = tables["train"][self.split.group_by] if self.split.group_by else range(len(tables["train"]))
        config = SplitConfig(**shares, group_by=self.split.group_by, seed=self.split.seed)
        rows = split_rows(list(groups), config)
        return tables | {split: tables["train"].select(numbers) for split, numbers in rows.items()}

    def _encode(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        # A function of plain values: datasets pickles what it closes over, which must not be the whole model.
        options = {
            "tokenizer": self.tokenizer,
            "columns": (self.text_column, self.text_pair_column, self.label_column),
            "numbers": None if split == "predict" else self._numbers(table, split),
            "max_length": self.max_length,
        }
        described = {"remove_columns": table.column_names, "desc": f"tokenise {split}"}
        return table.map(encode_rows, batched=True, fn_kwargs=options, **described)

    def _numbers(self, table: datasets.Dataset, split: str) -> dict[str, int]:
        """The number of each label as it stands in the table, by its text.

        Raises:
            LoRAError: a label of this split is not among them, with its row.
        """
        numbers = {name: i for i, name in enumerate(self.label_names)}
        values = table[self.label_column]
        if all(isinstance(value, int) for value in values) and not numbers.keys() >= {str(v) for v in values}:
            numbers = {str(i): i for i in range(self.num_classes)}
        for row, label in enumerate(values):
            if str(label) not in numbers:
                raise LoRAError(
                    f"the {split} set, row {table[ROW][row]}, column '{self.label_column}': the label {label!r} is not"
                    f" one of {', '.join(self.label_names[:10])}{did_you_mean(str(label), self.label_names)}"
                )
        return numbers
