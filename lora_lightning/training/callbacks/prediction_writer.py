"""Writes the predictions of `lora-lightning predict`: one JSON line per example, in the order of the data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console
from torch import Tensor

from lora_lightning.data import set_name, table_of
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats.atomic_dir import write_bytes
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.strategies.collectives import gather


class PredictionWriter(BasePredictionWriter):
    """Writes `predictions.jsonl` into the run's folder: row, prediction, label name where the data has names.

    The columns that `predict --columns` names are written too, by default `id` where there is one; one that is called
    as a prediction's field is, such as `label`, is written as `data_label`. Further sets are written to separate
    files, such as `predictions_mismatched.jsonl`.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise for a column that does not exist before anything is predicted."""
        self._columns(trainer, 0)

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Gather all processes' predictions and write one file for each set."""
        data, folder = trainer.datamodule, run.dir_to_write(trainer)  # type: ignore[attr-defined]
        by_set = predictions if len(batch_indices) > 1 else [predictions]
        for index, (batches, indices) in enumerate(zip(by_set, batch_indices or [[]], strict=True)):
            columns = self._columns(trainer, index)
            parts = gather(list(rows(batches, indices, getattr(data, "label_names", None))))
            if folder is None:
                continue
            found = sorted((row for part in parts for row in part), key=lambda row: row["row"])
            keys, lines = {key for row in found for key in row}, []
            for row in found:
                beside = {f"data_{n}" if n in keys else n: _plain(values[row["row"]]) for n, values in columns.items()}
                lines.append({"row": row["row"], **beside, **row})
            name = set_name(data, "predict", index)
            file = folder / f"predictions{name and f'_{name}'}.jsonl"
            write_bytes(file, json_lines(lines))
            Console().print(f"{len(lines)} predictions in {file}", soft_wrap=True)

    def _columns(self, trainer: Trainer, index: int) -> Mapping[str, Sequence[Any]]:
        """The columns to write beside the predictions of the set with this number."""
        data, wanted = trainer.datamodule, getattr(trainer, "predict_columns", None)  # type: ignore[attr-defined]
        if (table := table_of(data)) is not None:
            return table.columns_to_join(index, wanted)
        if wanted:
            raise LoRAError(f"--columns is for data that are tables; {type(data).__name__} has no columns")
        return {}


def rows(
    batches: Sequence[Mapping[str, Any]], indices: Sequence[Sequence[int]], names: list[str] | None
) -> Iterator[dict[str, Any]]:
    """One mapping per example, from each batch's tensors or lists and the rows that they belong to."""
    for batch, numbers in zip(batches, indices, strict=True):
        for i, number in enumerate(numbers):
            row: dict[str, Any] = {"row": number}
            row |= {key: _plain(values[i]) for key, values in batch.items()}
            predicted = row.get("prediction")
            if names and isinstance(predicted, int):
                row["label"] = names[predicted]
            elif names and isinstance(predicted, list) and all(isinstance(number, int) for number in predicted):
                row["labels"] = [names[number] for number in predicted]
            yield row


def json_lines(values: Iterable[Mapping[str, Any]]) -> bytes:
    """A JSON object in each line."""
    return "".join(json.dumps(value, ensure_ascii=False, default=str) + "\n" for value in values).encode()


def _plain(value: Any) -> Any:
    """The value as JSON has it; NaN and infinities become null."""
    value = value.tolist() if isinstance(value, Tensor) else value
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
