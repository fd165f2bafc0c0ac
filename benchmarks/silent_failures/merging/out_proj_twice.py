"""LoRA on a whole `nn.MultiheadAttention`: the update of its output projection counts twice.

huggingface/peft#3774, open: `merge()` adds the update to `out_proj` itself and calls `out_proj.merge()`, which adds it
again, in every merged model and in every forward. Compared with an attention whose weights hold the update once.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import apart, our_config, peft_config
from lora_lightning import inject

TITLE = "in `nn.MultiheadAttention` the update of `out_proj` counts twice"
THREAD = "huggingface/peft#3774"
WARNS = "out_proj|MultiheadAttention"
X = torch.linspace(-1, 1, 2 * 3 * 16).reshape(2, 3, 16)
SCALE = 2.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def measured(model: nn.Module) -> Measured:
    """Give A and B values, and compare with a plain attention that has W0 + s B A as its weights."""
    draw, plain = torch.Generator().manual_seed(2), Net()
    found = {name: p for name, p in model.named_parameters() if "lora_" in name}
    for p in found.values():
        p.data = torch.randn(p.shape, generator=draw) / 10
    pairs = [(a, found[name.replace("lora_A", "lora_B")], name) for name, a in found.items() if "lora_A" in name]
    for a, b, name in pairs:
        weight = plain.attention.out_proj.weight if "out_proj" in name else plain.attention.in_proj_weight
        weight.data += SCALE * b.detach() @ a.detach()
    off = apart(model.eval()(X), plain.eval()(X))
    return Measured(off < 1e-5, f"outputs are {off:.0%} off")


def ours(folder: Path) -> Measured:
    model = Net()
    inject(model, our_config(target_modules=["attention"]))
    return measured(model)


def peft(folder: Path) -> Measured:
    from peft import get_peft_model

    return measured(get_peft_model(Net(), peft_config(target_modules=["attention"])))  # type: ignore[arg-type]


lightning = peft
