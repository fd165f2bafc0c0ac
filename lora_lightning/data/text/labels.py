"""Label names and the numbers that stand for them, for whatever is labelled."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lora_lightning.data.base import TableData
from lora_lightning.data.io.rows import ROW, cells_of, values_of
from lora_lightning.lora.errors import LoRAError, did_you_mean

MOST_NAMED = 10
"""Labels that an error lists."""


class LabelNames(TableData):
    """A `TableData` whose targets have names; they and their count flow to the backbone and the task by linking.

    A subclass sets `given_label_names`, None where they are to be read off train.
    """

    given_label_names: list[str] | None
    _label_names: list[str] | None = None

    @abstractmethod
    def names_in_train(self) -> list[str]:
        """Names in the order of their numbers where none are given."""

    def read(self) -> dict[str, datasets.Dataset]:
        tables = super().read()
        if "train" not in tables and not self.given_label_names:
            raise LoRAError(
                f"the set has no train split, only {', '.join(tables)}: labels are read off train; without it, give"
                " data.init_args.label_names"
            )
        return tables

    @property
    def label_names(self) -> list[str]:
        """Names of the labels, in the order of their numbers."""
        if self._label_names is None:
            names = list(self.given_label_names or self.names_in_train())
            if len(set(names)) < len(names):
                raise LoRAError(f"label_names holds a name twice: {names}")
            self._label_names = names
        return self._label_names

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return len(self.label_names)

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

    def unknown_label(self, split: str, row: int, column: str, label: object, numbers: Iterable[str]) -> LoRAError:
        """The error for a label that is none of `numbers`, which is what the column's labels are looked up in."""
        names = self.label_names
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        expected = f"one of the labels {', '.join(names[:MOST_NAMED])}{more}"
        if not set(names) & set(numbers):
            expected += f", as 0 to {len(names) - 1}"
        return self.bad_cell(split, row, column, expected, label, did_you_mean(str(label), names))


class OneLabel(LabelNames):
    """One label for each row, a name or a number, in the column `label_column`."""

    label_column: str

    def read(self) -> dict[str, datasets.Dataset]:
        return without_hidden_labels(super().read(), self.label_column)

    def names_in_train(self) -> list[str]:
        train = self.tables["train"]
        feature = train.features[self.label_column]
        if isinstance(feature, datasets.ClassLabel):
            return list(feature.names)
        names = [str(value) for value in sorted(set(values_of(train, self.label_column)))]
        if len(names) == 1:
            raise LoRAError(
                f"{self.place('train')}, column '{self.label_column}': expected at least 2 labels, got '{names[0]}' in"
                " every row: name another with label_column, or all labels as label_names"
            )
        return names

    def check_labels(self, table: datasets.Dataset, split: str) -> None:
        """Raise where a row has no label, or where it is neither a name nor a number, as the rows before have."""
        kinds = "a label, a name or a number"
        first: type | None = None
        for row, label in cells_of(table, ROW, self.label_column):
            if not isinstance(label, str | int | float) or (isinstance(label, float) and not math.isfinite(label)):
                raise self.bad_cell(split, row, self.label_column, kinds, label)
            first = first or type(label)
            if type(label) is not first:
                kind = "a name" if first is str else "a number"
                raise self.bad_cell(split, row, self.label_column, f"{kind}, as in the rows before", label)

    def label_numbers(self, table: datasets.Dataset, split: str) -> list[int]:
        """The number of each row's label.

        Raises:
            LoRAError: a label is none of the names, or a number that none of them has, with its row.
        """
        feature, values = table.features[self.label_column], list(values_of(table, self.label_column))
        check_order(self.label_names, feature)
        numbers = numbers_of(self.label_names, values, feature)
        for row, label in zip(values_of(table, ROW), values, strict=True):
            if str(label) not in numbers:
                raise self.unknown_label(split, row, self.label_column, label, numbers)
        return [numbers[str(label)] for label in values]

    def majority_share(self, split: str) -> float:
        """Accuracy on `split` of always saying the label that is most common in train."""
        train = list(values_of(self.encoded("train"), "labels"))
        most_common = max(set(train), key=train.count)
        labels = list(values_of(self.encoded(split), "labels"))
        return labels.count(most_common) / len(labels)


def numbers_of(names: Sequence[str], values: Sequence[Any], feature: Any = None) -> dict[str, int]:
    """The number of each label as a column holds it, by its text.

    A column of whole numbers of which none is a name holds the labels' numbers, as one of `ClassLabel` always does.
    Where the names are numbers themselves, a number is a name: rows of 0 alone are not the first of 1 and 2.
    """
    by_name = {name: i for i, name in enumerate(names)}
    whole = all(isinstance(value, int) for value in values) and not all(_is_number(name) for name in names)
    if isinstance(feature, datasets.ClassLabel) or (whole and not any(str(value) in by_name for value in values)):
        return {str(i): i for i in range(len(names))}
    return by_name


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def check_order(names: list[str], feature: Any) -> None:
    """Raise where names are the set's own in another order: that would rename the classes."""
    if isinstance(feature, datasets.ClassLabel) and sorted(names) == sorted(feature.names) and names != feature.names:
        raise LoRAError(f"label_names must be in the set's own order, {feature.names}, got {names}")


def _hidden(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) and value == -1 for value in values)


def without_hidden_labels(tables: dict[str, datasets.Dataset], label_column: str) -> dict[str, datasets.Dataset]:
    """Splits with labels, and for prediction those whose labels a hub set hides by -1, unless others are for that."""
    used: dict[str, datasets.Dataset] = {}
    for split, table in tables.items():
        hidden = split != "train" and label_column in table.column_names and _hidden(values_of(table, label_column))
        if not hidden:
            used[split] = table
        elif "predict" not in tables:
            _, _, name = split.partition("_")
            used[f"predict_{name}" if name else "predict"] = table
    return used
