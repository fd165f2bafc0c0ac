"""PiSSA starts from W0's main directions and takes them out of W0.

huggingface/transformers#34468: "PiSSA updates base model weights silently"; an adapter trained without it then "will
output garbage" on that base. Compared here with the base itself, the adapter switched off.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import apart, llama, our_config, peft_config
from lora_lightning import disabled, inject

TITLE = "PiSSA overwrites W0: without the adapter the model is not the base"
THREAD = "huggingface/transformers#34468"
WARNS = "pissa|base|residual"
X = torch.arange(8)[None]


def measured(logits: torch.Tensor) -> Measured:
    off = apart(logits, llama().eval()(input_ids=X).logits)
    return Measured(off == 0, f"outputs are {off:.0%} off")


def ours(folder: Path) -> Measured:
    model = llama().eval()
    inject(model, our_config(init="pissa"))
    with disabled(model):
        return measured(model(input_ids=X).logits)


def peft(folder: Path) -> Measured:
    from peft import get_peft_model

    model = get_peft_model(llama().eval(), peft_config(init_lora_weights="pissa")).eval()
    with model.disable_adapter():
        return measured(model(input_ids=X).logits)


lightning = peft
