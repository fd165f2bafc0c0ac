"""A name in `target_modules` that matches nothing, beside one that does.

huggingface/peft#3603 documents it for hybrid models, where 7% of the layers were adapted: PEFT raises only when none of
the names matches, and skips the others.
"""

from pathlib import Path

from torch import nn

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import b_matrices, llama, our_config, peft_config
from lora_lightning import inject

TITLE = "one of two target names is misspelt"
THREAD = "huggingface/peft#3603"
WARNS = "v_porj"
NAMES = ["q_proj", "v_porj"]


def measured(model: nn.Module) -> Measured:
    count = len(b_matrices(model))
    return Measured(count == 4, f"{count} of 4 layers adapted")


def ours(folder: Path) -> Measured:
    model = llama()
    inject(model, our_config(target_modules=NAMES))
    return measured(model)


def peft(folder: Path) -> Measured:
    from peft import get_peft_model

    return measured(get_peft_model(llama(), peft_config(target_modules=NAMES)))


lightning = peft  # around a PEFT model it is the same call
