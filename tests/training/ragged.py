"""Tiny fits on rows of unlike length, in float64, and what they end with: what `strategies.py` puts side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lora_lightning import LoRAConfig, LoRAModule
from lora_lightning.data.loading.sampler import EpochSampler
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.tasks.base import StepOutput, Task
from lora_lightning.training.trainer import LoRATrainer
from tests.training.resuming import whole
from tests.training.small import trainer_of

VOCABULARY, LENGTH, ROWS = 11, 9, 68
"""ROWS: per process and micro-batch of 2, 17 micro-batches: the last window of 3 or 4 is short."""
CLIP = 0.05
"""A norm that the gradients are above, so that clipping shows."""


class Tokens(Task):
    """The mean over tokens whose label is not -100."""

    def __init__(self) -> None:
        accuracy = MulticlassAccuracy(VOCABULARY, average="micro", ignore_index=-100)
        super().__init__(MetricCollection({"accuracy": accuracy}))

    def step(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        logits, labels = backbone(batch["ids"]).flatten(0, 1), batch["labels"].flatten()
        count = int((labels != -100).sum())
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum") / max(count, 1)
        return StepOutput(loss, count, logits, labels)

    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"logits": backbone(batch["ids"])}


class Block(nn.Module):
    """A norm and two linear layers around it, odd in size: no number of processes divides its rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 13), nn.Linear(13, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return y


class Net(nn.Module):
    """Token by token; the head is tied to the embedding."""

    def __init__(self, width: int = 17, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(self.norm(x)) * self.scale
        return logits


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02)


def module(dtype: torch.dtype = torch.float64, optimizer: Any = adamw, **config: Any) -> LoRAModule:
    torch.manual_seed(0)
    lora = LoRAConfig(**{"r": 3, "alpha": 6, "target_modules": ["up", "down"]} | config)
    return LoRAModule(Net().to(dtype), Tokens(), lora, optimizer=optimizer)


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Sequences with 0 to LENGTH trained tokens, so that some micro-batches have none."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (count, LENGTH), generator=g)
    lengths = torch.randint(0, LENGTH + 1, (count, 1), generator=g)
    lengths[torch.rand(count, 1, generator=g) < 0.4] = 0
    lengths[::4] = lengths[::4].clamp(min=2)  # of the four rows of two processes, one at least
    labels = torch.where(torch.arange(LENGTH) < lengths, (ids * 3 + 1) % VOCABULARY, -100)
    return [{"ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]


class Ragged(LightningDataModule):
    """In the rows' own order; 13 are validated on, which two or four processes cannot share evenly."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return self.loader(rows(ROWS, seed=1))

    def val_dataloader(self) -> Any:
        return self.loader(rows(13, seed=2))

    def loader(self, data: Any) -> Any:
        places = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        sampler = EpochSampler(data, batch_size=self.batch_size, shuffle=False, **places)
        return DataLoader(data, batch_size=self.batch_size, sampler=sampler)


class Record(Callback):
    """What rank 0 has at the end: the adapter, the logged loss of each optimizer step, and the metrics."""

    def __init__(self, file: Path | None) -> None:
        self.file, self.losses, self.out = file, [], {}

    def on_before_zero_grad(self, trainer: Trainer, *_: Any) -> None:
        if "train/loss_step" in trainer.callback_metrics:
            self.losses.append(float(trainer.callback_metrics["train/loss_step"]))

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        self.on_before_zero_grad(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LoRAModule) -> None:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.endswith("_step")}
        adapter = {k: whole(v).detach().clone() for k, v in adapter_tensors(pl_module.backbone).items()}
        self.out = {"adapter": adapter, "losses": self.losses, "metrics": metrics, "steps": trainer.global_step}
        if self.file is not None and trainer.is_global_zero:
            torch.save(self.out, self.file)


def fit(
    data: int | LightningDataModule | DataLoader[Any],
    *callbacks: Callback,
    file: Path | None = None,
    made: LoRAModule | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train for 20 optimizer steps or more, on `Ragged` of that batch size or on other data; tell as `Record` does."""
    record = Record(file)
    given = {"devices": 1, "max_epochs": 4, "gradient_clip_val": CLIP, "num_sanity_val_steps": 0}
    given |= {"callbacks": [record, *callbacks], "enable_checkpointing": False} | options
    trainer = trainer_of(None, LoRATrainer, **given)
    trainer.fit(made or module(), Ragged(data) if isinstance(data, int) else data)
    return record.out


def furthest(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest difference of two adapters, relative to each tensor's largest entry."""
    return max(float((ours["adapter"][k] - v).abs().max() / v.abs().max()) for k, v in theirs["adapter"].items())


def assert_alike(ours: dict[str, Any], one: dict[str, Any], closeness: float = 1e-9) -> None:
    assert ours["steps"] == one["steps"] >= 6
    assert furthest(ours, one) < closeness
    assert ours["losses"] == pytest.approx(one["losses"], rel=closeness)
    assert ours["metrics"] == pytest.approx(one["metrics"], rel=max(1e-6, closeness))
