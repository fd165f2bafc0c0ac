"""The batch on which an export is verified: the data's first, or the model's `example_input_array`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.frozen.dtype import float_dtype
from lora_lightning.tasks.base import Task

MOST_ROWS = 8
"""Rows of a DataModule's batch: logits of a language model for a whole batch would not fit beside two models."""


@dataclass(frozen=True)
class Probe:
    """Arguments of the backbone by name, and where they come from."""

    inputs: dict[str, Any]
    source: str


def loaders_of(datamodule: LightningDataModule) -> Iterator[Any]:
    """The validation loaders, then the training loaders, of a DataModule that is set up; either may be missing."""
    for name in ("val_dataloader", "train_dataloader"):
        if is_overridden(name, datamodule, LightningDataModule):  # Lightning's own raises
            yield getattr(datamodule, name)()


def first_batch(loaders: Iterable[Any], module: LightningModule) -> dict[str, Any] | None:
    """The first batch of the first loader that has one, on the module's device.

    None where no loader has one, or where batches do not name the backbone's arguments and there is an
    `example_input_array`.

    Args:
        loaders: loaders, or lists, dicts and CombinedLoaders of them; they need no length.

    Raises:
        LoRAError: the batch is no mapping by name and there is no `example_input_array`.
    """
    combined = (one if isinstance(one, CombinedLoader) else CombinedLoader(one) for one in loaders)
    single = (loader for one in combined for loader in one.flattened if loader is not None)
    batch = next((batch for loader in single for batch in loader), None)
    task, backbone = getattr(module, "task", None), getattr(module, "backbone", None)
    if isinstance(task, Task) and task.takes_tuples and isinstance(batch, tuple | list):
        batch = task.inputs(module.backbone, batch)  # type: ignore[arg-type]
    if isinstance(batch, Mapping) and all(isinstance(key, str) for key in batch):
        return {key: move_data_to_device(value, module.device) for key, value in batch.items()}
    if batch is None or _example(backbone, module.example_input_array) is not None:
        return None
    parts = f" of {', '.join(type(part).__name__ for part in batch)}" if isinstance(batch, tuple | list) else ""
    raise LoRAError(
        "an export is proven on a batch that names the backbone's arguments, such as {'input_ids': tensor}; the data's"
        f" first is a {type(batch).__name__}{parts}: let collate_fn return a dict, or give the module an"
        " example_input_array"
    )


def probe_from(backbone: nn.Module, task: Task, batch: Mapping[str, Any] | None, example: Any = None) -> Probe:
    """The first rows of a batch without its labels; without a batch, the example input.

    Args:
        backbone: the adapted model; its `example_input_array` is used where `example` is None.
        task: says which of a batch's entries the backbone takes.
        batch: as the DataModule gives it.
        example: a LightningModule's `example_input_array`: a tensor, a tuple, or a mapping by name.

    Raises:
        LoRAError: there is neither.
    """
    if batch is not None:
        return Probe(first_rows(task.inputs(backbone, batch)), "the data's first batch")
    example = _example(backbone, example)
    if example is None:
        raise LoRAError(
            f"there is no batch to prove the export of {type(backbone).__name__} on: give the config a data section,"
            " or the model an example_input_array"
        )
    if not isinstance(example, Mapping):
        values = example if isinstance(example, tuple | list) else (example,)
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names = [name for name, p in inspect.signature(backbone.forward).parameters.items() if p.kind in kinds]
        example = dict(zip(names, values, strict=False))
    device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
    return Probe(move_data_to_device(dict(example), device), "example_input_array")


def _example(backbone: nn.Module | None, example: Any) -> Any:
    return getattr(backbone, "example_input_array", None) if example is None else example


def first_rows(batch: Mapping[str, Any]) -> dict[str, Any]:
    """At most `MOST_ROWS` rows of a batch without its labels; entries without a dimension of rows stay whole."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    counted = {k: v for k, v in inputs.items() if isinstance(v, list | tuple) or (isinstance(v, Tensor) and v.dim())}
    sizes = {key: len(value) for key, value in counted.items()}
    rows = {size for key, size in sizes.items() if isinstance(inputs[key], Tensor)}
    if len(rows) != 1 or max(rows) <= MOST_ROWS:
        return inputs
    return {key: value[:MOST_ROWS] if sizes.get(key) in rows else value for key, value in inputs.items()}


def cast_to_weights(backbone: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Floating-point inputs in the dtype of half-precision weights, which layers need outside of autocast."""
    dtype = float_dtype(backbone)
    return dict(inputs) if dtype.itemsize > 2 else cast_floats(inputs, dtype)


def cast_floats(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs with floating-point tensors in `dtype`."""
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
