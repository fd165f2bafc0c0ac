"""`max_length` cuts every answer off behind its prompt: all labels are -100.

huggingface/trl#6668: the Trainer reported a loss of 0.0 and finished, while the loss was NaN; "nothing warns, and the
run looks successful". trl now leaves such rows out while it prepares the data (#6320). The rows here are prepared
already.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import (
    Plain,
    b_matrices,
    fit_lightning,
    fit_ours,
    fit_trainer,
    llama,
    our_config,
    peft_config,
    texts,
    trained,
)

TITLE = "truncation left no label to train on"
THREAD = "huggingface/trl#6668"
WARNS = r"label|\bnan\b|truncat|trained on"


def rows() -> list[dict[str, Tensor]]:
    return [{**row, "labels": torch.full_like(row["labels"], -100)} for row in texts()]


def measured(model: nn.Module, loss: float) -> Measured:
    moved = any(bool(b.count_nonzero()) for b in b_matrices(model))
    return Measured(moved and loss > 0, f"loss {loss:.1f}, {trained(model)}")


def ours(folder: Path) -> Measured:
    module = fit_ours(llama(), rows(), our_config())
    return measured(module, float(module.trainer.callback_metrics["train/loss"]))


def peft(folder: Path) -> Measured:
    from peft import get_peft_model

    model = get_peft_model(llama(), peft_config())
    trainer = fit_trainer(model, rows(), folder)
    return measured(model, trainer.state.log_history[0]["loss"])


def lightning(folder: Path) -> Measured:
    from peft import get_peft_model

    model = get_peft_model(llama(), peft_config())
    trainer = fit_lightning(Plain(model), rows())
    return measured(model, float(trainer.callback_metrics["loss"]))
