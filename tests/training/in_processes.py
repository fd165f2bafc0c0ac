"""A run's whole way in processes that Python spawns or forks. Run as `python -m tests.training.in_processes FOLDER`."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from lora_lightning import (
    Checkpoints,
    FreezeBase,
    LoRAConfig,
    LoRAModule,
    Resume,
    RunReport,
    SequenceClassification,
    TextClassificationData,
    huggingface,
)
from lora_lightning.data.io.splits import SplitConfig
from lora_lightning.training.callbacks.prediction_writer import PredictionWriter
from lora_lightning.training.tracking.csv_logger import ContinuedCSVLogger
from lora_lightning.training.trainer import LoRATrainer

STEPS = 20


def module(folder: Path) -> LoRAModule:
    """In float64, where another order of a sum is not seen."""
    torch.manual_seed(0)
    lora, optimizer = LoRAConfig(r=4, modules_to_save=["classifier"]), functools.partial(torch.optim.AdamW, lr=0.01)
    return LoRAModule(
        huggingface(str(folder / "bert"), num_labels=2).double(), SequenceClassification(2), lora, optimizer
    )


def data(folder: Path, batch: int) -> TextClassificationData:
    """116 rows to train on, and 42 to validate on and to test: of batches of 2, four processes have 6, 6, 5 and 5."""
    files, split = (str(folder / "reviews.csv"), str(folder / "bert")), SplitConfig(validation=0.21, test=0.21)
    return TextClassificationData(*files, batch_size=batch, eval_batch_size=2, split=split, length_grouped=False)


def trainer(folder: Path, name: str, steps: int = STEPS, **options: Any) -> LoRATrainer:
    callbacks = [FreezeBase(show_table=False), Resume(), Checkpoints(save_every=5), PredictionWriter(), RunReport()]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    logger = ContinuedCSVLogger(folder, name=name, version=0)
    own = {"max_steps": steps, "accelerator": "cpu", "precision": "64-true", "devices": 1, **options}
    return LoRATrainer(callbacks=callbacks, logger=logger, **own, **quiet)


def flow(folder: Path, name: str, batch: int, **options: Any) -> None:
    """Fit half of it, go on, evaluate in several processes, export in this one; what came of it to `NAME.json`."""
    checkpoint = folder / name / "version_0" / "checkpoints" / "last.ckpt"
    trainer(folder, name, STEPS // 2, **options).fit(module(folder), data(folder, batch))
    trainer(folder, name, **options).fit(module(folder), data(folder, batch), ckpt_path=checkpoint)
    found = {}
    for stage in ("validate", "test"):
        one = trainer(folder, name, **options)
        getattr(one, stage)(module(folder), datamodule=data(folder, batch), ckpt_path=checkpoint, verbose=False)
        found |= {key: float(value) for key, value in one.callback_metrics.items()}
    predicting = trainer(folder, name, **options)
    predicting.predict(
        module(folder),
        datamodule=data(folder, batch),
        ckpt_path=checkpoint,
        return_predictions=predicting.num_devices < 2,
    )
    report = trainer(folder, name).export(
        module(folder), data(folder, batch), str(checkpoint), str(folder / f"{name}-out")
    )
    found["export"] = report.max_rel_diff
    (folder / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    place = Path(sys.argv[1])
    flow(place, "ddp_spawn", 8, strategy="ddp_spawn", devices=2)
    flow(place, "ddp_fork", 2, strategy="ddp_fork", devices=4, accumulate_grad_batches=2)
    flow(place, "alone", 16)
