"""What a run is about, in the words of its first screen and of its report."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lora_lightning.lora.layers.class_swap import Grafted
from lora_lightning.lora.report import InjectionReport
from lora_lightning.training.checkpoints import run_folder as run


def backbone_name(backbone: nn.Module) -> str:
    """The backbone's class, and where its weights come from if it says so: a hub name, or a path's last two parts."""
    kind = type(backbone)
    while issubclass(kind, Grafted) or FSDPModule in kind.__bases__:
        kind = kind.grafted_from[1] if issubclass(kind, Grafted) else kind.__bases__[1]  # fully_shard puts itself first
    name = kind.__name__
    config = getattr(backbone, "config", None)
    source = getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None)
    if not isinstance(source, str) or not source:
        return name
    return f"{name} ({'/'.join(PurePath(source.replace('package:', '')).parts[-2:])})"


def short_count(number: int) -> str:
    """A number of parameters as people say it: 22.7M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size * 0.9995:
            return f"{number / size:.3g}{unit}"
    return str(number)


def adapted_rows(report: InjectionReport) -> list[dict[str, Any]]:
    """The grouped injection table as plain data, one mapping of its columns a row."""
    header, *lines = report.shown()
    return [dict(zip(header, line, strict=True)) for line in lines]


def first_lines(trainer: Trainer, backbone: nn.Module, report: InjectionReport) -> list[str]:
    """Backbone and size; device, precision and processes; where results go."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    where = f"{trainer.world_size} x {name}" if trainer.world_size > 1 else name
    folder = run.run_dir(trainer)
    told = "nowhere" if folder is None else str(folder)
    others = [_place(logger) for logger in trainer.loggers if not isinstance(logger, CSVLogger)]
    told += f" and {', '.join(others)}" if others and folder is not None else ""
    return [
        f"{backbone_name(backbone)}, {short_count(report.frozen)} frozen parameters",
        f"on {where} in {trainer.precision}; results go to {told}",
    ]


def _place(logger: Logger) -> str:
    """Where this logger's results are found."""
    if not isinstance(logger, WandbLogger):
        return type(logger).__name__
    return f"W&B (wandb sync {Path(logger.experiment.dir).parent})" if logger._offline else "W&B"
