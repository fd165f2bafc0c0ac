"""Fits on texts, alone and in two processes. Run as `python -m tests.training.texts_in_two FOLDER`."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from lora_lightning import LoRAConfig, LoRAModule
from lora_lightning.data.language_modelling import LanguageModellingData
from lora_lightning.tasks.language_model import CausalLM
from tests.tiny_lm import make_model, make_texts, make_tokenizer
from tests.training.ragged import Record

WAYS: dict[str, dict[str, Any]] = {
    "packed": {},
    "plain": {"packing": False},
    "streamed": {"streaming": True, "shuffle_buffer": 20},
}
STEPS, BATCH = 12, 4


def write(folder: Path) -> None:
    """Texts of unlike length, of which neither batches nor processes get the same numbers, and a tokenizer."""
    make_tokenizer().save_pretrained(folder)
    for split, count in (("train", 97), ("validation", 11)):
        texts = make_texts(count, longest=20, seed=count)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def fit(folder: Path, way: str, batch: int, file: Path | None = None, **options: Any) -> dict[str, Any]:
    """Train, validate twice, and tell as `Record` does."""
    record = Record(file)
    optimizer = functools.partial(torch.optim.AdamW, lr=0.01)
    module = LoRAModule(make_model("llama", dtype=torch.float64), CausalLM(), LoRAConfig(r=4), optimizer)
    data = LanguageModellingData(str(folder), str(folder), max_length=24, batch_size=batch, **WAYS[way])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    epochs = {"check_val_every_n_epoch": None, "val_check_interval": STEPS // 2}
    own = {"max_steps": STEPS, "max_epochs": -1, "precision": "64-true", "accelerator": "cpu", "devices": 1}
    trainer = Trainer(**{**own, **epochs, **options}, **quiet, enable_model_summary=False, callbacks=[record])
    trainer.fit(module, datamodule=data)
    return record.out


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name in WAYS:
        fit(folder, name, BATCH, folder / f"{name}.pt", devices=2, strategy="ddp_fork")
