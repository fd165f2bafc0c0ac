"""A fit of seconds through the package's own parts: module, Trainer, guards, checkpoint and export."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_lightning.export.export import export
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.tasks.classification import SequenceClassification
from lora_lightning.training.callbacks.freeze_base import FreezeBase
from lora_lightning.training.checkpoints.model_checkpoint import Checkpoints
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.trainer import LoRATrainer

STEPS, ROWS, WIDTH = 60, 64, 16


@dataclass(frozen=True)
class Figures:
    """What came of it."""

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


def tiny_fit() -> Figures:
    """Train, save a checkpoint, export and read back, in a temporary folder and without a word.

    Raises:
        Exception: whatever does not work.
    """
    began = time.perf_counter()
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder, _without_a_word():
        torch.manual_seed(0)
        x = torch.randn(ROWS, WIDTH)
        labels = (x.sum(1) > 0).long()
        module = LoRAModule(
            Net(),
            SequenceClassification(num_classes=2),
            LoRAConfig(r=4, modules_to_save=["head"]),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        )
        before = _loss(module.backbone, x, labels)
        trainer = LoRATrainer(
            max_steps=STEPS,
            devices=1,
            logger=CSVLogger(folder),
            callbacks=[FreezeBase(), Checkpoints()],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        rows = [{"x": row, "labels": label} for row, label in zip(x, labels, strict=True)]
        trainer.fit(module, DataLoader(rows, batch_size=16))  # type: ignore[arg-type]  # a list will do
        device = str(trainer.strategy.root_device)
        module = module.cpu()
        after = _loss(module.backbone, x, labels)
        w0, batch = module.w0_fingerprint(), {"x": x, "labels": labels}
        report = export(module.backbone, module.task, w0, Path(folder) / "export", batch=batch)
    return Figures(STEPS, device, before, after, report.max_abs_diff, time.perf_counter() - began)


@torch.no_grad()
def _loss(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    return float(nn.functional.cross_entropy(model(x), labels))


@contextmanager
def _without_a_word() -> Iterator[None]:
    """Tables, Lightning's log and warnings are for real runs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
