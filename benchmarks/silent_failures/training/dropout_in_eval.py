"""An adapter with dropout is put into a model that is in eval mode, and drops out at inference.

huggingface/peft#3760: new modules start in training mode, so that of a model in eval "two identical forwards disagree".
"""

from pathlib import Path

import torch
from torch import nn

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import apart, llama, our_config, peft_config
from lora_lightning import inject

TITLE = "an adapter put into a model in eval mode drops out"
THREAD = "huggingface/peft#3760"
WARNS = "dropout|eval|training mode"


def measured(model: nn.Module) -> Measured:
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    x = torch.arange(8)[None]
    off = apart(model(x).logits, model(x).logits)
    return Measured(off == 0, f"two equal calls differ by {off:.0%}")


def ours(folder: Path) -> Measured:
    model = llama().eval()
    inject(model, our_config(dropout=0.5))
    return measured(model)


def peft(folder: Path) -> Measured:
    from peft import get_peft_model

    return measured(get_peft_model(llama().eval(), peft_config(lora_dropout=0.5)))


lightning = peft
