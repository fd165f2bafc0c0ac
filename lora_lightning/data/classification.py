"""Labels and their numbers; and texts with one label, several labels or a number each."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lora_lightning.data.base import TableData
from lora_lightning.data.io.tables import ROW, cells_of, values_of
from lora_lightning.data.text import TextPairData
from lora_lightning.lora.errors import LoRAError, did_you_mean

MOST_NAMED = 10
"""Labels at most that an error lists."""


class LabelNames(TableData):
    """A `TableData` whose targets have names; the command links them and their count to the backbone and the task.

    A subclass sets `given_label_names`; None reads them from the training rows.
    """

    given_label_names: list[str] | None
    label_column: str
    one_label_each: bool = True
    first_label: str | None = None
    """The label before all others, which are sorted."""

    def labels_in(self, cell: Any) -> list[Any]:
        """The labels in a cell of the label column."""
        return [cell]

    def names_in_train(self) -> list[str]:
        """The names in the training rows, in the order of their numbers."""
        train = self.tables["train"]
        if names := set_names(train.features[self.label_column]):
            return names
        labels = {label for cell in values_of(train, self.label_column) for label in self.labels_in(cell)}
        ordered = sorted(labels, key=lambda label: (label != self.first_label, isinstance(label, str), label))
        return list(dict.fromkeys(map(str, ordered)))

    def numbers(self, table: datasets.Dataset, split: str) -> dict[str, int]:
        """The number of each label by its text in the label column; an unknown one is refused with its row.

        A column of integers of which none is a name has the labels' numbers, as a `ClassLabel` always does. Where the
        names are numbers themselves, an integer is a name: rows of 0 alone are not the first of 1 and 2.
        """
        names, of_set = self.label_names, set_names(table.features[self.label_column])
        if of_set and sorted(names) == sorted(of_set) and names != of_set:  # which would rename the classes
            raise LoRAError(f"label_names must be in the set's own order, {of_set}, got {names}")
        labels = {label for cell in values_of(table, self.label_column) for label in self.labels_in(cell)}
        whole = all(isinstance(label, int) for label in labels) and not all(map(is_number, names))
        by_number = of_set or (whole and not {str(label) for label in labels} & set(names))
        numbers = {str(i) if by_number else name: i for i, name in enumerate(names)}
        if all(str(label) in numbers for label in labels):
            return numbers
        rows = ((row, label) for row, cell in cells_of(table, ROW, self.label_column) for label in self.labels_in(cell))
        row, unknown = next((row, label) for row, label in rows if str(label) not in numbers)
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        expected = f"one of the labels {', '.join(names[:MOST_NAMED])}{more}"
        expected += f", as 0 to {len(names) - 1}" if not set(names) & set(numbers) else ""
        raise self.bad_cell(split, row, self.label_column, expected, unknown, did_you_mean(str(unknown), names))

    def read(self) -> dict[str, datasets.Dataset]:
        tables = super().read()
        if "train" not in tables and not self.given_label_names:
            raise LoRAError(
                f"the set has no train split, only {', '.join(tables)}: labels are read off train; without it, give"
                " data.init_args.label_names"
            )
        return tables

    @cached_property
    def label_names(self) -> list[str]:
        """Names of the labels, in the order of their numbers."""
        names = list(self.given_label_names or self.names_in_train())
        if len(set(names)) < len(names):
            raise LoRAError(f"label_names holds a name twice: {names}")
        return names

    @property
    def num_classes(self) -> int:
        """The number of labels."""
        return len(self.label_names)

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        counts = self.label_counts("train").values() if "train" in self.tables else ()
        rows = sum(counts) if self.one_label_each else len(self.tables["train"])
        if counts and all(count in (0, rows) for count in counts):
            raise LoRAError(
                f"{self.place('train')}: all {rows:,} rows have the same label, of {len(self.label_names)} that there"
                " are, and nothing can be learnt: give rows of each"
            )

    def label_counts(self, split: str) -> dict[str, int]:
        encoded: Any = self._encoded.get(split)
        labels = getattr(encoded, "labels", None)  # of images
        if isinstance(encoded, datasets.Dataset) and "labels" in encoded.column_names:
            column = encoded.select_columns(["labels"]).with_format("arrow")[:]["labels"]
            labels = pc.list_flatten(column) if pa.types.is_list(column.type) else column
        if labels is None:
            return {}
        numbers = np.asarray(labels)
        if numbers.dtype.kind == "f":  # a 0 or 1 for each label
            counts = numbers.reshape(-1, self.num_classes).sum(0)
        else:
            counts = np.bincount(numbers[numbers >= 0], minlength=self.num_classes)
        return {name: int(count) for name, count in zip(self.label_names, counts, strict=True)}

    def read_off_train(self) -> dict[str, Any]:
        return {"label_names": self.label_names}


class OneLabel(LabelNames):
    """One label for each row, a name or a number, in the column `label_column`."""

    label_column: str

    def read(self) -> dict[str, datasets.Dataset]:
        return without_hidden_labels(super().read(), self.label_column)

    def names_in_train(self) -> list[str]:
        names = super().names_in_train()
        if len(names) == 1:
            raise LoRAError(
                f"{self.place('train')}, column '{self.label_column}': expected at least 2 labels, got '{names[0]}' in"
                " every row: name another with label_column, or all labels as label_names"
            )
        return names

    def check_targets(self, table: datasets.Dataset, split: str) -> None:
        """Raise where a row has no label, or a name among numbers or a number among names."""
        is_label = lambda value: isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))  # noqa: E731
        self.check_cells(table, split, [self.label_column], "a label, a name or a number", is_label)
        first = type(next(values_of(table, self.label_column), None))
        kind = "a name" if first is str else "a number"
        is_alike = lambda value: type(value) is first  # noqa: E731
        self.check_cells(table, split, [self.label_column], f"{kind}, as in the rows before", is_alike)

    def targets(self, table: datasets.Dataset, split: str) -> list[int]:
        """The number of each row's label; an unknown one is refused with its row."""
        numbers = self.numbers(table, split)
        return [numbers[str(label)] for label in values_of(table, self.label_column)]

    def majority_share(self, split: str) -> float:
        """Accuracy on `split` of always predicting the most common label of train."""
        train, counts = self.label_counts("train"), self.label_counts(split)
        return counts[max(train, key=train.__getitem__)] / sum(counts.values())


def set_names(feature: Any) -> list[str]:
    """The names of a `ClassLabel`, or of a list of them; none of another feature."""
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else []


def is_number(text: str) -> bool:
    """Whether a text can be read as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def without_hidden_labels(tables: dict[str, datasets.Dataset], label_column: str) -> dict[str, datasets.Dataset]:
    """Return the splits with labels; one whose labels are all -1 becomes `predict`, unless there is one."""
    used: dict[str, datasets.Dataset] = {}
    for split, table in tables.items():
        labels = values_of(table, label_column) if split != "train" and label_column in table.column_names else [0]
        if not all(isinstance(label, int | float) and label == -1 for label in labels):
            used[split] = table
        elif "predict" not in tables:
            _, _, name = split.partition("_")
            used[f"predict_{name}" if name else "predict"] = table
    return used


class TextClassificationData(OneLabel, TextPairData):
    """Files or a Hugging Face set to batches of token ids, attention masks and label numbers.

    Args:
        label_column: the label, a name or a number.
        label_names: names in the order of their numbers. By default the set's, else the sorted values in train.
        drop_labels: rows with these labels are left out.
        drop_duplicates: keep the first of rows with the same text.
        min_words: leave out shorter texts.
        texts: arguments of `TextPairData`.
    """

    def __init__(
        self,
        *texts: Any,
        label_column: str = "label",
        label_names: list[str] | None = None,
        drop_labels: list[str] | None = None,
        drop_duplicates: bool = False,
        min_words: int = 0,
        **table: Any,
    ) -> None:
        super().__init__(*texts, **table)
        self.label_column, self.given_label_names, self.target_columns = label_column, label_names, [label_column]
        self.drop_labels, self.drop_duplicates, self.min_words = set(drop_labels or ()), drop_duplicates, min_words

    def check(self, table: datasets.Dataset, split: str) -> None:
        """Raise for a text that is none in a row that is not dropped."""
        labels = values_of(table, self.label_column) if split != "predict" else ()
        dropped = [str(label) in self.drop_labels for label in labels]
        self.check_texts(table, split, self.input_columns, skip=dropped)

    def filter(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        labels = [str(value) for value in values_of(table, self.label_column)]
        missing = self.drop_labels - set(labels)
        if split == "train" and missing:
            unknown = min(missing)
            raise LoRAError(f"drop_labels: no row is labelled '{unknown}'{did_you_mean(unknown, labels)}")
        seen, rows = set[tuple[Any, ...]](), []
        texts = cells_of(table, *filter(None, (self.text_column, self.text_pair_column)))
        for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
            if label in self.drop_labels or len(text[0].split()) < self.min_words:  # a dropped row may have no text
                continue
            if not self.drop_duplicates or text not in seen:
                seen.add(text)
                rows.append(row)
        if not rows:
            raise LoRAError(f"no row of the {split} set is left after drop_labels, drop_duplicates and min_words")
        return table if len(rows) == len(table) else table.select(rows)


class MultiLabelTextData(LabelNames, TextPairData):
    """Files or a Hugging Face set to batches of token ids, attention masks and `labels` (n, num_classes) of 0 and 1.

    Labels come in one of three forms: a column of lists, a column of texts such as `sport;politics`, or a column of 0
    and 1 for each label. A row may have none.

    Args:
        label_column: the labels, names or numbers, in a list or in one text.
        separator: between labels in one text.
        label_columns: in place of `label_column`, a column of 0 and 1 for each label, whose name is the label's.
        label_names: names in the order of their numbers. By default the set's, else the sorted values in train.
        texts: arguments of `TextPairData`.
    """

    one_label_each = False

    def __init__(
        self,
        *texts: Any,
        label_column: str = "labels",
        separator: str = ";",
        label_columns: list[str] | None = None,
        label_names: list[str] | None = None,
        **table: Any,
    ) -> None:
        super().__init__(*texts, **table)
        if label_columns and label_names and list(label_names) != list(label_columns):
            raise LoRAError(f"label_columns name the labels, {label_columns}: leave label_names out, got {label_names}")
        if not separator:
            raise LoRAError("separator must be what stands between two labels, such as ';', got an empty text")
        self.label_column, self.separator, self.label_columns = label_column, separator, label_columns
        self.given_label_names, self.target_columns = label_columns or label_names, label_columns or [label_column]

    def check_targets(self, table: datasets.Dataset, split: str) -> None:
        expected = "0 or 1" if self.label_columns else f"a list of labels, or labels with '{self.separator}' between"
        self.check_cells(table, split, self.target_columns, expected, self._is_right)

    def _is_right(self, cell: Any) -> bool:
        if self.label_columns:
            return isinstance(cell, int | float) and cell in (0, 1)
        labels = cell if isinstance(cell, list) else [cell or ""]
        return all(isinstance(label, str | int) for label in labels)

    def targets(self, table: datasets.Dataset, split: str) -> list[list[float]]:
        """0 or 1 for each label; an unknown one is refused with its row."""
        if self.label_columns:
            return [[float(flag) for flag in row] for row in cells_of(table, *self.label_columns)]
        numbers, targets = self.numbers(table, split), []
        for cell in values_of(table, self.label_column):
            named = {numbers[str(label)] for label in self.labels_in(cell)}
            targets.append([float(i in named) for i in range(self.num_classes)])
        return targets

    def labels_in(self, cell: list[Any] | str | int | None) -> list[Any]:
        """A cell's labels. An empty cell of a CSV is None, and a column of single numbers has numbers."""
        if isinstance(cell, list | int):
            return cell if isinstance(cell, list) else [cell]
        return [part for text in (cell or "").split(self.separator) if (part := text.strip())]


class TextRegressionData(TextPairData):
    """Files or a Hugging Face set to batches of token ids, attention masks and numbers.

    Args:
        number_column: the number to predict, in any unit.
        texts: arguments of `TextPairData`.
    """

    num_classes = 1
    """Outputs of the head."""

    def __init__(self, *texts: Any, number_column: str = "label", **table: Any) -> None:
        super().__init__(*texts, **table)
        self.number_column, self.target_columns = number_column, [number_column]

    def read(self) -> dict[str, datasets.Dataset]:
        return without_hidden_labels(super().read(), self.number_column)

    @property
    def label_names(self) -> list[str]:
        """Return the one output's name: by the link that names classes, one name makes a head of one output."""
        return [self.number_column]

    def check_targets(self, table: datasets.Dataset, split: str) -> None:
        is_finite = lambda value: math.isfinite(number_in(value))  # noqa: E731
        self.check_cells(table, split, self.target_columns, "a finite number", is_finite)

    def targets(self, table: datasets.Dataset, split: str) -> list[float]:
        numbers = [number_in(value) for value in values_of(table, self.number_column)]
        if split == "train" and len(set(numbers)) == 1 and len(numbers) > 1:
            raise LoRAError(
                f"{self.place('train')}, column '{self.number_column}': expected at least 2 numbers, got"
                f" {numbers[0]:g} in every row: name another with number_column"
            )
        return numbers


def number_in(value: Any) -> float:
    """The number that a cell holds, NaN where it holds none. One stray word makes a CSV's whole column text."""
    is_text = isinstance(value, str) and is_number(value)
    return float(value) if is_text or (isinstance(value, int | float) and not isinstance(value, bool)) else math.nan
