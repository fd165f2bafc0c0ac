"""Fits of a tiny BERT with all that makes resuming hard, and what they end with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lora_lightning import (
    Checkpoints,
    FreezeBase,
    LoRAConfig,
    LoRAModule,
    Resume,
    SequenceClassification,
    TextClassificationData,
    huggingface,
)
from lora_lightning.data.io.splits import SplitConfig
from lora_lightning.training.optim import WarmupDecay
from lora_lightning.training.tracking.csv_logger import ContinuedCSVLogger
from lora_lightning.training.trainer import LoRATrainer


class EveryState(Checkpoints):
    """Keeps a copy of each `last.ckpt`."""

    def _save_newest(self, trainer: Trainer) -> None:
        before = self._newest
        super()._save_newest(trainer)
        if self._newest != before and trainer.is_global_zero:
            step, kind = self._newest
            shutil.copyfile(self.last_model_path, Path(self.last_model_path).with_name(f"{step:03}-{kind}.ckpt"))


def fit(
    tiny: Any,
    folder: Path,
    *,
    ckpt: Path | None = None,
    callbacks: list[Any] | None = None,
    plateau: bool = False,
    data: dict[str, Any] | None = None,
    datamodule: Any = None,
    **trainer: Any,
) -> Trainer:
    """Three epochs of six or so steps, with dropout, shuffling and grouping by length."""
    seed_everything(11, verbose=False)
    lora = LoRAConfig(r=4, dropout=0.2, modules_to_save=["classifier"])
    schedule = (lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0)) if plateau else WarmupDecay
    module = LoRAModule(
        huggingface(tiny.bert, num_labels=2),
        SequenceClassification(2),
        lora,
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01),
        lr_scheduler=schedule,
        backbone_mode="train",  # its own dropout draws random numbers too
    )
    options: dict[str, Any] = {"batch_size": 20, "split": SplitConfig(validation=0.2, test=0.2, group_by="film")}
    made = datamodule or TextClassificationData(tiny.reviews, tiny.bert, **options | (data or {}))
    settings: dict[str, Any] = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": ContinuedCSVLogger(folder, name="run", version=0),
    }
    given = [FreezeBase(show_table=False), Resume(), EveryState(save_every=1)] if callbacks is None else callbacks
    # Another number of random draws than in the first fit, in front of the resumed one.
    if ckpt is not None:
        torch.rand(7)
    made_by = LoRATrainer(callbacks=given, **settings | trainer)
    made_by.fit(module, made, ckpt_path=None if ckpt is None else str(ckpt))
    return made_by


def ended(trainer: Trainer) -> dict[str, Any]:
    """All that a fit leaves in the module, its optimizer and its schedule."""
    module: LightningModule = trainer.lightning_module
    weights = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    states = {
        f"{i}.{key}": value
        for i, state in enumerate(trainer.optimizers[0].state_dict()["state"].values())
        for key, value in state.items()
    }
    counts = {"step": trainer.global_step, "epoch": trainer.current_epoch}
    return {**weights, **states, **counts, "rates": [g["lr"] for g in trainer.optimizers[0].param_groups]}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same to the bit."""
    assert one.keys() == other.keys()

    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return [name for name in one if not same(one[name], other[name])]
