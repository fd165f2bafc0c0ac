"""A fit over a bfloat16 base, alone or in two processes. Run as `python -m tests.training.narrow_in_two FILE`."""

from __future__ import annotations

import functools
import sys
import tempfile
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lora_lightning import FreezeBase, LoRAConfig, LoRAModule, LoRATrainer, SequenceClassification
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.frozen.tensors import adapter_tensors
from tests.training.test_module import Vision, loader

BATCH = 12
"""Half of all rows: Lightning's sampler for two processes shuffles, and so every step sees the same rows."""


class Tell(Callback):
    """Notes what came of the fit, in the process that ran it."""

    def __init__(self, file: str | None) -> None:
        self.file, self.out = file, dict[str, Any]()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LoRAModule)
        tensors = {name: t.detach().clone() for name, t in adapter_tensors(pl_module.backbone).items()}
        self.out = {"adapter": tensors, "w0": fingerprint(pl_module.backbone).digest, "steps": trainer.global_step}
        if self.file is not None and trainer.is_global_zero:
            torch.save(self.out, self.file)


def fit(batch: int, file: str | None = None, **options: Any) -> dict[str, Any]:
    """Six steps, and what `Tell` notes of them."""
    tell = Tell(file)
    torch.manual_seed(0)
    optimizer = functools.partial(torch.optim.SGD, lr=0.5)  # Adam would blow bfloat16's rounding up to whole steps
    module = LoRAModule(Vision(), SequenceClassification(2), LoRAConfig(r=2, modules_to_save=["head"]), optimizer)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 6}
    with tempfile.TemporaryDirectory() as folder:
        trainer = LoRATrainer(
            accelerator="cpu",
            callbacks=[FreezeBase(show_table=False), tell],
            default_root_dir=folder,
            enable_model_summary=False,
            **{"devices": 1, "precision": "bf16-base", "gradient_clip_val": 1.0, **quiet, **options},
        )
        trainer.fit(module, loader(batch=batch))
    return tell.out


if __name__ == "__main__":
    fit(BATCH, sys.argv[1], devices=2, strategy="ddp_fork")
