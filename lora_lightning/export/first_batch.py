"""The data's first batch, on which an export is proven, from whatever loaders there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import Task


def loaders_of(datamodule: LightningDataModule) -> Iterator[Any]:
    """Those for validation, then those for training, of a DataModule that is set up; either may be missing."""
    for name in ("val_dataloader", "train_dataloader"):
        if is_overridden(name, datamodule, LightningDataModule):  # Lightning's own raises
            yield getattr(datamodule, name)()


def first_batch(loaders: Iterable[Any], module: LightningModule) -> dict[str, Any] | None:
    """The first batch of the first loader that gives one, on the module's device.

    None where no loader gives any, or where batches do not name the backbone's arguments and an `example_input_array`
    does.

    Args:
        loaders: loaders, or lists, dicts and CombinedLoaders of them. No length is asked: a stream has none.

    Raises:
        LoRAError: the batch is no mapping by name, with what to give instead.
    """
    batch = next((batch for loader in _flat(loaders) for batch in loader), None)
    task: Any = getattr(module, "task", None)
    if isinstance(task, Task) and task.takes_tuples and isinstance(batch, tuple | list):
        batch = task.inputs(module.backbone, batch)  # type: ignore[arg-type]
    if isinstance(batch, Mapping) and all(isinstance(key, str) for key in batch):
        return {key: move_data_to_device(value, module.device) for key, value in batch.items()}
    if batch is None or _example(module) is not None:
        return None
    raise LoRAError(
        "an export is proven on a batch that names the backbone's arguments, such as {'input_ids': tensor}; the data's"
        f" first is {_described(batch)}: let collate_fn return a dict, or give the module an example_input_array"
    )


def _flat(loaders: Any) -> Iterator[Any]:
    """The loaders in lists, tuples, dicts and CombinedLoaders, in order."""
    if isinstance(loaders, Mapping):
        loaders = loaders.values()
    for one in loaders:
        if isinstance(one, CombinedLoader):
            yield from one.flattened
        elif isinstance(one, list | tuple | Mapping):
            yield from _flat(one)
        elif one is not None:
            yield one


def _example(module: LightningModule) -> Any:
    own = module.example_input_array
    return getattr(getattr(module, "backbone", None), "example_input_array", None) if own is None else own


def _described(batch: Any) -> str:
    parts = f" of {', '.join(type(part).__name__ for part in batch)}" if isinstance(batch, tuple | list) else ""
    return f"a {type(batch).__name__}{parts}"
