"""Fits of a contrastive task, alone and in two processes. Run as `python -m tests.training.paired FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, default_collate

from lora_lightning import LoRAConfig, LoRAModule
from lora_lightning.tasks.contrastive import ContrastiveEmbedding
from tests.training import ragged

WIDTH, STEPS, SHARES = 8, 12, (2, 3)
"""SHARES: how many pairs of each step of 5 the two processes have."""


class Encoder(nn.Module):
    """Embeddings (n, d) of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x)


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Anchors, positives near them, hard negatives less near; some positives are of one group."""
    g = torch.Generator().manual_seed(seed)
    anchors = torch.randn(count, WIDTH, generator=g, dtype=torch.float64)
    near, far = (anchors + share * torch.randn(count, WIDTH, generator=g).double() for share in (0.5, 1.0))
    parts = zip(anchors, near, far, range(count), strict=True)
    return [
        {
            "anchor": {"x": a},
            "positive": {"x": p},
            "negative": {"x": n},
            "labels": torch.tensor([i % 4 + 4 * (i % 5), -1]),
        }
        for a, p, n, i in parts
    ]


def module(**task: Any) -> LoRAModule:
    torch.manual_seed(0)
    options = {"temperature": 0.2, "symmetric": True} | task
    return LoRAModule(
        Encoder().double(),
        ContrastiveEmbedding(**options),
        LoRAConfig(r=3, alpha=6, target_modules=["net.0", "net.2"]),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.02),
    )


class Pairs(LightningDataModule):
    """Steps of 5 pairs, 2 and 3 in two processes; 13 are validated on, 4 at a time."""

    def train_dataloader(self) -> Any:
        size, starts = sum(SHARES), [0, SHARES[0]]
        first = 0 if self.trainer.world_size == 1 else starts[self.trainer.global_rank]
        count = size if self.trainer.world_size == 1 else SHARES[self.trainer.global_rank]
        batches = [[size * k + first + i for i in range(count)] for k in range(STEPS)]
        return DataLoader(rows(size * STEPS, seed=1), batch_sampler=batches, collate_fn=default_collate)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        mine = rows(13, seed=2)[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(mine, batch_size=4)  # type: ignore[arg-type]


def fit(file: Path | None = None, task: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Two epochs, and tell as `ragged.Record` does."""
    options = {"max_epochs": 2, "use_distributed_sampler": False} | options
    return ragged.fit(0, file=file, data=Pairs(), made=module(**(task or {})), **options)


if __name__ == "__main__":
    fit(Path(sys.argv[1]) / "gathered.pt", strategy="ddp_fork", devices=2)
    fit(Path(sys.argv[1]) / "alone.pt", {"gather": False}, strategy="ddp_fork", devices=2)
