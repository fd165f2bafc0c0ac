"""The output projection of `nn.MultiheadAttention` is adapted by name, and its parent reads only its weight.

helicalAI/helical#405: the attention applies `F.linear(x, out_proj.weight)` and never calls `out_proj`, so that its
adapter "was never on the gradient path and never trained", in two published models.
"""

from pathlib import Path

import torch
from torch import nn

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import apart, our_config, peft_config
from lora_lightning import inject

TITLE = "the attention bypasses the adapter on its `out_proj`"
THREAD = "helicalAI/helical#405"
WARNS = "out_proj"
X = torch.linspace(-1, 1, 2 * 3 * 16).reshape(2, 3, 16)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)


def measured(model: nn.Module) -> Measured:
    """With an A and a B that are not zero the output has to be another."""
    draw = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=draw)
    change = apart(model(X), encoder()(X))
    return Measured(change > 1e-3, f"the adapter changes the output by {change:.0%}")


def ours(folder: Path) -> Measured:
    model = encoder()
    inject(model, our_config(target_modules=["out_proj"]))
    return measured(model)


def peft(folder: Path) -> Measured:
    from peft import get_peft_model

    return measured(get_peft_model(encoder(), peft_config(target_modules=["out_proj"])))  # type: ignore[arg-type]


lightning = peft
