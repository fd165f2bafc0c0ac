"""A small backbone with batch statistics, rows for it, and one way to fit it."""

import torch
from lightning.pytorch import Trainer
from torch import nn

from lora_lightning import FreezeBase
from tests.factories import move


class Vision(nn.Module):
    """A backbone of one's own, with batch statistics and dropout."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 16))
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.body(x))


def loader(n=24, batch=8):
    torch.manual_seed(1)
    x = torch.randn(n, 6)
    rows = [{"x": a, "labels": (a.sum() > 0).long()} for a in x]
    return torch.utils.data.DataLoader(rows, batch_size=batch)


def trainer_of(folder, kind=Trainer, **kwargs):
    """One epoch on the CPU, quietly and without a log."""
    options = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"default_root_dir": folder, "logger": False, "log_every_n_steps": 1} | kwargs
    return kind(**options)


def fit(folder, module, *callbacks, data=None, **options):
    """An epoch of `module` under `FreezeBase`, without checkpoints; returns the trainer."""
    guard = [] if any(isinstance(one, FreezeBase) for one in callbacks) else [FreezeBase(show_table=False)]
    trainer = trainer_of(folder, callbacks=[*guard, *callbacks], **{"enable_checkpointing": False} | options)
    trainer.fit(module, loader() if data is None else data)
    return trainer


def shaken(module, size=0.1):
    """With its adapter away from zero."""
    move(module.backbone, size)
    return module.eval()
