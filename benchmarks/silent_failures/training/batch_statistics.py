"""A base with batch normalisation: its statistics move though its weights are frozen, and no adapter file holds them.
them.

Lightning-AI/pytorch-lightning#15062: a frozen backbone gave other results after training, since `running_mean` and
`running_var` still changed. lightly-ai/lightly#1438 says the same of `requires_grad = False`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import Plain, apart, fit_lightning, fit_ours, fit_trainer, our_config, peft_config
from lora_lightning import SequenceClassification, load_adapter, save_adapter

TITLE = "batch statistics of a frozen base move and are not saved"
THREAD = "Lightning-AI/pytorch-lightning#15062"
WARNS = "batch ?norm|statistic|running"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.head = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.norm(self.body(x)).relu())
        return logits if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(8, generator=draw) + 1, "labels": torch.tensor(i % 3)} for i in range(32)]


X = torch.linspace(-1, 1, 32).reshape(4, 8)


def measured(trained: nn.Module, reloaded: nn.Module) -> Measured:
    off = apart(reloaded.eval()(X), trained.eval()(X))
    return Measured(off < 1e-5, f"outputs of the saved adapter are {off:.0%} off")


def ours(folder: Path) -> Measured:
    task = SequenceClassification(num_classes=3)
    config = our_config(target_modules=["body"])
    trained = fit_ours(Net(), rows(), config, task=task, steps=20, backbone_mode="train").backbone
    save_adapter(trained, folder / "adapter")
    fresh = Net()
    load_adapter(fresh, folder / "adapter")
    return measured(trained, fresh)


def wrapped() -> nn.Module:
    from peft import get_peft_model

    return get_peft_model(Net(), peft_config(target_modules=["body"]))  # type: ignore[arg-type]


def reloaded(model: Any, folder: Path) -> nn.Module:
    from peft import PeftModel

    model.save_pretrained(folder / "adapter")
    return PeftModel.from_pretrained(Net(), folder / "adapter")  # type: ignore[arg-type]


def peft(folder: Path) -> Measured:
    model = wrapped()
    fit_trainer(model, rows(), folder, steps=20)
    return measured(model, reloaded(copy.deepcopy(model), folder))


def lightning(folder: Path) -> Measured:
    model = wrapped()
    fit_lightning(Plain(model), rows(), steps=20)
    return measured(model, reloaded(copy.deepcopy(model), folder))
