"""`modules_to_save` names a head, and another module's name ends in the same letters.

huggingface/peft#1917: the names are compared with `endswith`, so that `img_model.layers.0` trains with
`model.layers.0`.
"""

from pathlib import Path

from torch import nn

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import our_config, peft_config
from lora_lightning import inject

TITLE = "`modules_to_save: [head]` in a model that also has an `overhead`"
THREAD = "huggingface/peft#1917"
WARNS = "overhead"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.overhead, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)


def measured(model: nn.Module) -> Measured:
    others = {name for name, p in model.named_parameters() if p.requires_grad and "overhead" in name}
    return Measured(not others, f"{len(others)} tensors of the overhead train")


def ours(folder: Path) -> Measured:
    model = Net()
    inject(model, our_config(target_modules=["body"], modules_to_save=["head"]))
    return measured(model)


def peft(folder: Path) -> Measured:
    from peft import get_peft_model

    return measured(get_peft_model(Net(), peft_config(target_modules=["body"], modules_to_save=["head"])))  # type: ignore[arg-type]


lightning = peft
