"""A fit that takes seconds and uses all of the command: parser, data, module, Trainer, guards, checkpoint, export."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from lora_lightning.cli.build import build_run
from lora_lightning.export.export import export

STEPS, ROWS, WIDTH = 60, 64, 16


@dataclass(frozen=True)
class Figures:
    """The results of the tiny fit."""

    steps: int
    device: str
    before: float
    after: float
    """Cross-entropy on the rows that were trained on."""
    apart: float
    """Largest difference between the outputs of the adapted model and the merged one that was read back."""
    seconds: float


class Net(nn.Module):
    """Two layers to adapt, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 2) of x (n, WIDTH)."""
        logits: Tensor = self.head(self.body(x))
        return logits


class Signs(Dataset[dict[str, Tensor]]):
    """Random rows; the label of each is whether its sum is positive."""

    def __init__(self) -> None:
        self.rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"x": self.rows[row], "labels": (self.rows[row].sum() > 0).long()}


CONFIG = {
    "trainer": {"max_steps": STEPS, "devices": 1, "log_every_n_steps": 4, "enable_progress_bar": False},
    "model": {
        "backbone": {"class_path": f"{__name__}.Net"},
        "lora": {"r": 4, "modules_to_save": ["head"]},
        "task": {"class_path": "lora_lightning.SequenceClassification", "init_args": {"num_classes": 2}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
    },
    "data": {
        "class_path": "lora_lightning.DatasetData",
        "init_args": {split: {"class_path": f"{__name__}.Signs"} for split in ("train", "validation")}
        | {"batch_size": 16},
    },
}


def tiny_fit() -> Figures:
    """Train, save a checkpoint, export and read back, in a temporary folder and without output.

    Raises:
        Exception: whatever does not work.
    """
    began = time.perf_counter()
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder, _without_output():
        run = build_run(["fit", "--config", json.dumps(CONFIG), "--runs_dir", folder])
        assert run.trainer is not None
        before = run.validate()["val/loss"]
        run.trainer.fit(run.module, datamodule=run.data)
        after = run.validate()["val/loss"]
        module, rows = run.module.cpu(), Signs()
        batch = default_collate([rows[i] for i in range(len(rows))])
        report = export(module.backbone, module.task, module.w0_fingerprint(), Path(folder) / "export", batch=batch)
    device = str(run.trainer.strategy.root_device)
    return Figures(STEPS, device, before, after, report.max_abs_diff, time.perf_counter() - began)


@contextmanager
def _without_output() -> Iterator[None]:
    """Within the block tables, Lightning's log and warnings are not shown."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
