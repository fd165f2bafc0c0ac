"""The base is in 4 bit, and merging puts the sum back into 4 bit.

huggingface/peft#1836: results differ between the merged and the unmerged model; after QLoRA they are "different -
worse". PEFT warns of rounding since it merges into 4 bit (#851). The merged model's outputs are compared with the
adapted model's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import llama, our_config, peft_config
from lora_lightning import inject, merge

TITLE = "a merge into a base of 4 bit rounds the update away"
THREAD = "huggingface/peft#1836"
WARNS = "4-?bit|rounding"
X = torch.arange(8)[None]


def base(folder: Path) -> Any:
    llama(hidden_size=64).save_pretrained(folder / "base")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=four, dtype=torch.float32).eval()


def outputs(model: Any) -> torch.Tensor:
    return model(input_ids=X).logits.detach()


def filled(model: Any) -> torch.Tensor:
    """Give A and B values, and return the adapted model's outputs."""
    draw = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=draw) / 20
    return outputs(model)


def measured(plain: torch.Tensor, adapted: torch.Tensor, merged: torch.Tensor) -> Measured:
    off = float((merged - adapted).norm() / (adapted - plain).norm())
    return Measured(off < 1e-3, f"outputs are off by {off:.0%} of what the adapter does")


def ours(folder: Path) -> Measured:
    model = base(folder)
    plain = outputs(model)
    inject(model, our_config())
    adapted = filled(model)
    merge(model)
    return measured(plain, adapted, outputs(model))


def peft(folder: Path) -> Measured:
    from peft import get_peft_model

    model = base(folder)
    plain = outputs(model)
    model = get_peft_model(model, peft_config())
    adapted = filled(model)
    return measured(plain, adapted, outputs(model.merge_and_unload()))


lightning = peft
