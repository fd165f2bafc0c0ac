"""Two batches are accumulated, one of 2 trained tokens and one of 30, and each counts half.

huggingface/transformers#24725: with the mean of each batch "each token in sample 2 would produce" another gradient than
accumulation over one batch of both. transformers' Trainer was mended in 2024 (#34191). The step that is taken with SGD
is compared with the gradient of the mean over all tokens.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import (
    Plain,
    apart,
    b_matrices,
    fit_lightning,
    fit_ours,
    fit_trainer,
    llama,
    our_config,
    peft_config,
    texts,
)
from lora_lightning import LoRAModule

TITLE = "accumulated batches of 2 and 30 tokens weigh the same"
THREAD = "huggingface/transformers#24725"
WARNS = "token|num_items|accumulat"


def rows() -> list[dict[str, Tensor]]:
    found = texts(2, 31)
    found[0]["labels"][3:] = -100  # labels are shifted by one: 2 and 30 tokens are trained on
    return found


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0)


def gradient(model: nn.Module) -> Tensor:
    """Of the mean over all 32 tokens, for all B."""
    model = copy.deepcopy(model)
    logits = torch.cat([model(input_ids=row["input_ids"][None])["logits"] for row in rows()])
    labels = torch.stack([row["labels"] for row in rows()])
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    return torch.cat(
        [p.grad.flatten() for name, p in model.named_parameters() if "lora_B" in name and p.grad is not None]
    )


def measured(model: nn.Module, wanted: Tensor) -> Measured:
    step = -torch.cat([b.flatten() for b in b_matrices(model)])
    off = apart(step, wanted)
    return Measured(off < 1e-4, f"the step is {off:.0%} off")


def ours(folder: Path) -> Measured:
    return in_ours(llama())


def in_ours(model: nn.Module) -> Measured:
    wanted = Before()
    settings = {"callbacks": [wanted], "optimizer": sgd, "trainer": {"accumulate_grad_batches": 2}}
    return measured(fit_ours(model, rows(), our_config(), steps=1, batch_size=1, **settings), wanted.gradient)


class Before(Callback):
    """Takes the wanted gradient of the adapted model, before the first step."""

    def on_train_start(self, trainer: Any, pl_module: LoRAModule) -> None:  # type: ignore[override]
        self.gradient = gradient(pl_module.backbone)


def of_peft(model: nn.Module) -> nn.Module:
    from peft import get_peft_model

    return get_peft_model(model, peft_config())  # type: ignore[arg-type]


def peft(folder: Path) -> Measured:
    return in_trainer(of_peft(llama()), folder)


def in_trainer(model: nn.Module, folder: Path) -> Measured:
    wanted = gradient(model)
    optimizer = sgd(model.parameters())
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "optimizers": (optimizer, constant)}
    fit_trainer(model, rows(), folder, steps=1, batch_size=1, **settings)
    return measured(model, wanted)


def lightning(folder: Path) -> Measured:
    model = of_peft(llama())
    wanted = gradient(model)
    fit_lightning(Plain(model, optimizer=sgd), rows(), steps=1, batch_size=1, accumulate_grad_batches=2)
    return measured(model, wanted)
