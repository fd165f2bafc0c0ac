"""A fit that begins under one strategy and ends under another. Run as `python -m tests.training.across FOLDER`."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from lora_lightning import LoRAConfig, LoRAModule
from lora_lightning.training.strategies.fsdp2.strategy import FSDP2Strategy
from tests.processes import in_processes
from tests.training import sharded

STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": functools.partial(DDPStrategy, broadcast_buffers=False, find_unused_parameters=True),
    "fsdp2": FSDP2Strategy,
}
ONE = "one process"
EPOCH, END = 7, 14
"""Steps."""


def module() -> LoRAModule:
    """By SGD: AdamW would make steps of the size of lr out of gradients that are rounding."""
    torch.manual_seed(0)
    lora = LoRAConfig(r=3, alpha=6, target_modules=["up", "down"], modules_to_save=["norm"])
    optimizer = functools.partial(torch.optim.SGD, lr=0.2, momentum=0.9)
    return LoRAModule(sharded.Net().double(), sharded.Told(), lora, optimizer=optimizer)


def begun(folder: Path, name: str, **options: Any) -> None:
    sharded.fit(folder / name, made=module, max_epochs=1, **options)


def ended(folder: Path, source: str, target: str, **options: Any) -> None:
    """From the other's checkpoint, for one more epoch."""
    place, ckpt = folder / f"{source} to {target}", sharded.at(folder / source, EPOCH)
    sharded.fit(place, made=module, ckpt=ckpt, max_epochs=2, **options)


def across(folder: Path, processes: int) -> None:
    """Each from each, and from one process."""
    for name, new in STRATEGIES.items():
        begun(folder, name, strategy=new(), devices=processes)
    for target, new in STRATEGIES.items():
        for source in (ONE, *STRATEGIES):
            ended(folder, source, target, strategy=new(), devices=processes)


if __name__ == "__main__":
    limit = float(os.environ.get("LIMIT", "900"))
    sys.exit(max(map(abs, in_processes(2, across, Path(sys.argv[1]), 2, timeout=limit))))
