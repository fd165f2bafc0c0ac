"""The base is in bfloat16, the update is small beside W0, and the merged weights round most of it away.

huggingface/peft#1388: after `merge_and_unload()` in bfloat16 the weights were not W0 + B A, and the loss was another.
Nobody can help it where the result is in bfloat16; one can say it. Here s B A is a thousandth of W0.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import our_config, peft_config
from lora_lightning import inject, merge

TITLE = "a merge in bfloat16 rounds a small update away"
THREAD = "huggingface/peft#1388"
WARNS = "round|precision"
SIZE, SCALE = 256, 2.0


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, SIZE)).to(torch.bfloat16)


def filled(model: nn.Module) -> Tensor:
    """Give A and B values; s B A of them, in float32."""
    draw = torch.Generator().manual_seed(2)
    found = {name: p for name, p in model.named_parameters() if "lora_" in name}
    for p in found.values():
        p.data = (torch.randn(p.shape, generator=draw) * 0.003).to(p.dtype)
    a, b = (next(p for name, p in found.items() if part in name).detach().float() for part in ("lora_A", "lora_B"))
    return SCALE * b @ a


def measured(merged: Tensor, update: Tensor) -> Measured:
    off = merged.detach().float() - (base()[0].weight.detach().float() + update)
    lost = float(off.norm() / update.norm())
    return Measured(lost < 0.1, f"the weights are off by {lost:.0%} of the update")


def ours(folder: Path) -> Measured:
    model = base()
    inject(model, our_config(target_modules=["0"]))
    update = filled(model)
    merge(model)
    return measured(model[0].weight, update)


def peft(folder: Path) -> Measured:
    from peft import get_peft_model

    model = get_peft_model(base(), peft_config(target_modules=["0"]))  # type: ignore[arg-type]
    update = filled(model)
    return measured(model.merge_and_unload()[0].weight, update)  # type: ignore[index,operator]


lightning = peft
