"""Fits of a tiny BERT with all that makes resuming hard, the states that they leave, and what they end with."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch.distributed.tensor import DTensor
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
from lora_lightning.training.checkpoints.loop_state import place_of
from lora_lightning.training.optim import WarmupDecay
from lora_lightning.training.tracking.loggers import ContinuedCSVLogger
from lora_lightning.training.trainer import LoRATrainer
from tests.training import small


class EveryState(Checkpoints):
    """Keeps a copy of each `last.ckpt`, by its step and where in an epoch that was."""

    def _save_last_checkpoint(self, trainer: Trainer, *candidates: Any) -> None:
        super()._save_last_checkpoint(trainer, *candidates)
        if trainer.is_global_zero and self.save_last:
            name = f"{trainer.global_step:03}-{place_of(trainer).kind}.ckpt"
            shutil.copyfile(self.last_model_path, Path(self.last_model_path).with_name(name))
        trainer.strategy.barrier()


def checkpoints(folder: Path) -> Path:
    return folder / "run" / "version_0" / "checkpoints"


def at(folder: Path, step: int) -> Path:
    """The last state with that many steps: an epoch's end rather than its last batch."""
    return max(checkpoints(folder).glob(f"{step:03}-*.ckpt"))


def logged(folder: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    with (folder / "run" / "version_0" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def trainer_of(*callbacks: Any, folder: Path, **options: Any) -> LoRATrainer:
    """Three epochs on the CPU, with each step in the log."""
    given = {"max_epochs": 3, "logger": ContinuedCSVLogger(folder, name="run", version=0)} | options
    return small.trainer_of(folder, LoRATrainer, callbacks=list(callbacks), **given)


def fit(
    tiny: Any,
    folder: Path,
    *more: Any,
    ckpt: Path | None = None,
    callbacks: list[Any] | None = None,
    plateau: bool = False,
    data: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    """Three epochs with dropout, shuffling and grouping by length; `callbacks` replace the usual ones and `more`."""
    seed_everything(11, verbose=False)
    lora = LoRAConfig(r=4, dropout=0.2, modules_to_save=["classifier"])
    module = LoRAModule(
        huggingface(tiny.bert, num_labels=2),
        SequenceClassification(2),
        lora,
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01),
        lr_scheduler=(lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0)) if plateau else WarmupDecay,
        backbone_mode="train",  # its own dropout draws random numbers too
    )
    split = SplitConfig(validation=0.2, test=0.2, group_by="film")
    made = TextClassificationData(tiny.reviews, tiny.bert, **{"batch_size": 20, "split": split} | (data or {}))
    usual = [*more, FreezeBase(show_table=False), Resume(), EveryState(save_every=1)]
    if ckpt is not None:
        torch.rand(7)  # another number of draws in front of a resumed fit
    trainer = trainer_of(*(usual if callbacks is None else callbacks), folder=folder, **options)
    trainer.fit(module, made, ckpt_path=None if ckpt is None else str(ckpt))
    return trainer


def ended(trainer: Trainer) -> dict[str, Any]:
    """All that a fit leaves in the module, its optimizer and its schedule; what lies in parts is gathered."""
    named = trainer.lightning_module.named_parameters()
    weights = {name: whole(p).detach().clone() for name, p in named if p.requires_grad}
    states = enumerate(trainer.optimizers[0].state_dict()["state"].values())
    moments = {f"{i}.{key}": whole(value) for i, state in states for key, value in state.items()}
    counts = {"step": trainer.global_step, "epoch": trainer.current_epoch}
    return {**weights, **moments, **counts, "rates": [g["lr"] for g in trainer.optimizers[0].param_groups]}


def whole(value: Any) -> Any:
    """A tensor that lies in parts, gathered; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same to the bit."""
    assert one.keys() == other.keys()

    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return [name for name in one if not same(one[name], other[name])]
