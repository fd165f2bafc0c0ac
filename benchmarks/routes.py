"""Through how many files of the package a batch, a save and a resume go: `python -m benchmarks.routes`.

A fit of a small model on one process, with the callbacks that a command's config has. A file counts where one of its
functions runs; a resume is all that `fit` runs before the first batch.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

import lora_lightning
from lora_lightning import (
    Checkpoints,
    FreezeBase,
    LoRAConfig,
    LoRAModule,
    LoRATrainer,
    Resume,
    StopOnNonFinite,
    Supervised,
)

ROOT = Path(lora_lightning.__file__).parent


@contextmanager
def noting(files: set[str]) -> Iterator[None]:
    """Within the block `files` gets each file of the package of which a function runs in this thread."""

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT):
                files.add(str(path.relative_to(ROOT)))

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


class Batch(Callback):
    """Notes what runs between the starts of the second and the third batch."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.block: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.block = noting(self.files)
            self.block.__enter__()
        elif batch_idx == 2:
            self.block.__exit__(None, None, None)


class Start(Callback):
    """Ends what is noted at the first batch."""

    def on_train_batch_start(self, *args: Any) -> None:
        sys.setprofile(None)


class NotedCheckpoints(Checkpoints):
    """Saves after each step, and notes what runs for it."""

    def __init__(self, folder: str) -> None:
        super().__init__(dirpath=folder, save_every=1)
        self.files: set[str] = set()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        with noting(self.files):
            super().on_train_batch_end(*args, **kwargs)


def make_fit(folder: Path, *callbacks: Callback, epochs: int = 1, ckpt: str | None = None) -> partial[None]:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    module = LoRAModule(backbone, Supervised(nn.MSELoss()), LoRAConfig(r=2, target_modules=["0", "2"]))
    rows = [{"input": torch.randn(8), "labels": torch.randn(4)} for _ in range(512)]
    given = [FreezeBase(show_table=False), StopOnNonFinite(), Resume(), *callbacks]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = LoRATrainer(max_epochs=epochs, callbacks=given, default_root_dir=folder, **quiet)
    return partial(trainer.fit, module, DataLoader(rows, batch_size=128), ckpt_path=ckpt)


def count_routes() -> dict[str, list[str]]:
    """The files of each route."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batch, resume = Batch(), set[str]()
        make_fit(folder / "batch", batch)()
        saves = NotedCheckpoints(str(folder / "saves"))
        make_fit(folder, saves)()
        last = str(folder / "saves" / "last.ckpt")
        resumed = make_fit(folder, Start(), epochs=2, ckpt=last)
        with noting(resume):
            resumed()
    return {"batch": sorted(batch.files), "save": sorted(saves.files), "resume": sorted(resume)}


if __name__ == "__main__":
    for route, files in count_routes().items():
        print(f"{route}: {len(files)} files")
        print("\n".join(f"  {file}" for file in files))
