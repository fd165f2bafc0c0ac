"""A fit goes on from a saved adapter, and W0 trains along.

Blaizzy/mlx-vlm#2178: a fresh run froze the base and a resumed one did not, so that 598.5M parameters trained in place
of 21.8M, with the same config. Closed by a pull request that freezes in both.
"""

from pathlib import Path

from torch import nn

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import (
    Plain,
    b_matrices,
    fit_lightning,
    fit_ours,
    fit_trainer,
    llama,
    moved,
    our_config,
    peft_config,
    texts,
)
from lora_lightning import inject, save_adapter

TITLE = "going on from a saved adapter also trains W0"
THREAD = "Blaizzy/mlx-vlm#2178"
WARNS = "train|frozen|freez"


def measured(model: nn.Module, adapter_trains: bool) -> Measured:
    count, total = moved(model, llama().state_dict()), len(llama().state_dict())
    return Measured(adapter_trains and not count, f"{count} of {total} tensors of W0 moved")


def ours(folder: Path) -> Measured:
    first = llama()
    inject(first, our_config())
    save_adapter(first, folder / "adapter")
    model = fit_ours(llama(), texts(), our_config(), init_adapter=str(folder / "adapter")).backbone
    return measured(model, any(b.count_nonzero() for b in b_matrices(model)))


def going_on(folder: Path) -> nn.Module:
    from peft import PeftModel, get_peft_model

    get_peft_model(llama(), peft_config()).save_pretrained(folder / "adapter")
    return PeftModel.from_pretrained(llama(), folder / "adapter", is_trainable=True)


def peft(folder: Path) -> Measured:
    model = going_on(folder)
    fit_trainer(model, texts(), folder)
    return measured(model, any(b.count_nonzero() for b in b_matrices(model)))


def lightning(folder: Path) -> Measured:
    model = going_on(folder)
    fit_lightning(Plain(model), texts())
    return measured(model, any(b.count_nonzero() for b in b_matrices(model)))
