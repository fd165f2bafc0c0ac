"""Fits under FSDP2. Run in several processes as `python -m tests.training.sharded WHAT FOLDER PROCESSES`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_lightning import LoRAConfig, LoRAModule
from lora_lightning.training.strategies import FSDP2Strategy
from tests.processes import in_processes
from tests.training import ragged
from tests.training.ragged import VOCABULARY, Tokens


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


def module(dtype: torch.dtype = torch.float64, **config: Any) -> LoRAModule:
    torch.manual_seed(0)
    lora = LoRAConfig(**{"r": 3, "alpha": 6, "target_modules": ["up", "down"]} | config)
    return LoRAModule(Net().to(dtype), Tokens(), lora, optimizer=lambda p: torch.optim.AdamW(p, lr=0.02))


def strategy(**options: Any) -> FSDP2Strategy:
    return FSDP2Strategy(**options)


def equality(folder: Path, processes: int) -> None:
    """The fits of `ragged`, sharded."""
    for accumulate in (1, 3):
        many = {"strategy": strategy(), "devices": processes, "accumulate_grad_batches": accumulate}
        ragged.fit(2, file=folder / f"{accumulate}.pt", made=module(), **many)


if __name__ == "__main__":
    what, where, number = sys.argv[1:]
    codes = in_processes(int(number), globals()[what], Path(where), int(number), timeout=float(os.environ.get("LIMIT", 240)))
    sys.exit(max(map(abs, codes)))
