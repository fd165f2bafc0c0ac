"""An `alpha_pattern` whose key matches no layer.

huggingface/peft#3582: such keys were applied to nothing without a word, and anchored ones such as `^q_proj` could never
match. Since then PEFT warns.
"""

from pathlib import Path

from torch import nn

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import llama, our_config, peft_config
from lora_lightning import inject
from lora_lightning.lora.inject import adapted_layers

TITLE = "an alpha for layers that no pattern matches"
THREAD = "huggingface/peft#3582"
WARNS = "alpha_pattern"
PATTERN = {"^q_proj": 100}


def measured(scales: list[float]) -> Measured:
    return Measured(100 / 4 in scales, f"scale {scales[0]:g} in place of 25")


def ours(folder: Path) -> Measured:
    model = llama()
    inject(model, our_config(alpha_pattern=PATTERN))
    return measured([layer.scale for name, layer in adapted_layers(model) if name.endswith("q_proj")])


def peft(folder: Path) -> Measured:
    from peft import get_peft_model

    model: nn.Module = get_peft_model(llama(), peft_config(alpha_pattern=PATTERN))
    layers = {name: module for name, module in model.named_modules() if name.endswith("q_proj")}
    return measured([layer.scaling["default"] for layer in layers.values()])


lightning = peft
