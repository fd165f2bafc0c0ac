"""Starts that are measured on data, put in when a fit begins: the module is built before its data are there."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from lora_lightning.lora.adapter import adapter_tensors
from lora_lightning.lora.calibrate import start_from_data
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.tasks.base import Task

MEASURED = ("eva", "lora_ga")
"""Starts that need batches. (`loftq` needs the model before quantisation, which no DataModule has.)"""
BATCHES = 8
"""Training batches to measure on; lora_ga's paper (2407.05000) uses as few, eva's (2410.07170) some more."""


def start_from_batches(backbone: nn.Module, task: Task, init: str, trainer: Trainer) -> None:
    """Put the start `init` into a freshly injected backbone, measured on the first training batches.

    Processes take rank 0's start, so that all begin at the same adapter.
    """
    device = next(backbone.parameters()).device
    loaders: Any = trainer.train_dataloader
    batches = [trainer.strategy.batch_to_device(batch, device) for batch in islice(iter(loaders), BATCHES)]
    if init == "eva":
        start_from_data(backbone, adapted_layers(backbone), init, [task.inputs(backbone, b) for b in batches], None)
    else:
        start_from_data(backbone, adapted_layers(backbone), init, batches, lambda model, b: task.step(model, b).loss)
    with torch.no_grad():
        for tensor in adapter_tensors(backbone).values():
            tensor.data.copy_(trainer.strategy.broadcast(tensor.data))
