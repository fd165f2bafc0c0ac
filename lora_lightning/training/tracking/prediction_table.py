"""A few rows of the validation set with what the adapted model says to them, for loggers that take tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lora_lightning.export.probe_batch import first_batch
from lora_lightning.tasks.positions import evaluating
from lora_lightning.training.callbacks.prediction_writer import rows
from lora_lightning.training.module import LoRAModule

SHOWN = 1000
"""Characters of a text that are shown."""


@torch.no_grad()
def prediction_table(trainer: Trainer, module: LoRAModule, count: int) -> tuple[list[str], list[list[Any]]] | None:
    """Columns and rows for the first `count` examples of this process; None where nothing is validated.

    Before what the task predicts stand the input, a text or a picture where it can be shown, and the target where it is
    one number.
    """
    batch = first_batch([trainer.val_dataloaders], module)
    if batch is None:
        return None
    with evaluating(module.backbone), trainer.precision_plugin.forward_context():
        said = module.task.predict(module.backbone, batch)
    names = getattr(trainer.datamodule, "label_names", None)  # type: ignore[attr-defined]
    size = min(count, *(len(values) for values in said.values()))
    told = [dict(row) for row in rows([said], [range(size)], names)]  # type: ignore[list-item]
    shown = _inputs(batch, getattr(trainer.datamodule, "tokenizer", None))  # type: ignore[attr-defined]
    targets = _targets(batch, names)
    for row, example, target in zip(told, shown or [None] * size, targets or [None] * size, strict=False):
        row.pop("row")  # in this batch; the set's own number is not known here
        row.update({"input": example} if shown else {})
        row.update({"target": target} if targets else {})
    columns = [name for name in ("input", "target") if name in told[0]]
    columns += [name for name in told[0] if name not in columns]
    return columns, [[_cell(row.get(name)) for name in columns] for row in told]


def _inputs(batch: Mapping[str, Any], tokenizer: Any) -> list[Any]:
    ids, pixels = batch.get("input_ids"), batch.get("pixel_values")
    if tokenizer is not None and isinstance(ids, Tensor):
        return [text[:SHOWN] for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    if isinstance(pixels, Tensor) and pixels.dim() == 4 and pixels.shape[1] in (1, 3):
        return list(_pictures(pixels))
    return []


def _pictures(pixels: Tensor) -> Iterator[Any]:
    """Each brought back to 0 to 255 by its own least and greatest value."""
    import wandb

    for one in pixels.float().cpu():
        low, high = one.min(), one.max()
        yield wandb.Image(((one - low) / (high - low).clamp(min=1e-9) * 255).byte().permute(1, 2, 0).numpy())


def _targets(batch: Mapping[str, Any], names: list[str] | None) -> list[Any]:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 1:
        return []
    values = labels.tolist()
    return [names[v] if names and isinstance(v, int) and 0 <= v < len(names) else v for v in values]


def _cell(value: Any) -> Any:
    """Lists as text: a table's column has one type."""
    return str(value)[:SHOWN] if isinstance(value, list | dict) else value
