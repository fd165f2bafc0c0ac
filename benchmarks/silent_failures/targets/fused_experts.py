"""`all-linear` on a mixture of experts, whose experts are one stack of matrices in transformers 5, and no linear
layers.

unslothai/unsloth#11014: "LoRA never attached to two thirds of each expert, and nothing warned". huggingface/peft#3009
asks for the fused experts of transformers 5, and PEFT's `all-linear` takes them since (#3232). Ours warns and leaves
them frozen.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import SIZES, our_config, peft_config
from lora_lightning import inject

TITLE = "`all-linear` on a mixture of experts"
THREAD = "unslothai/unsloth#11014"
WARNS = "experts.*frozen|frozen.*experts"


def mixtral() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=4, num_local_experts=4))


def measured(model: nn.Module) -> Measured:
    """Each block has two stacks, and each adapted one an A."""
    count, wanted = sum("experts" in name and "lora_A" in name for name, _ in model.named_parameters()), 4
    return Measured(count == wanted, f"{count} of {wanted} stacks of experts adapted")


def ours(folder: Path) -> Measured:
    model = mixtral()
    inject(model, our_config(target_modules="all-linear"))
    return measured(model)


def peft(folder: Path) -> Measured:
    from peft import get_peft_model

    return measured(get_peft_model(mixtral(), peft_config(target_modules="all-linear")))


lightning = peft
