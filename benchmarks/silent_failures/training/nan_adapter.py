"""The loss becomes NaN in the middle of a fit, and the fit ends as if all were well.

getainode/ainode#186: all 2,162,688 values of an adapter were NaN, the gradient's norm had been 3.3 million, "nothing
checked the loss, so the job is recorded as a success". Here a learning rate far too large brings it about.
"""

from pathlib import Path

import torch
from torch import nn

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import (
    Plain,
    fit_lightning,
    fit_ours,
    fit_trainer,
    llama,
    our_config,
    peft_config,
    texts,
)

TITLE = "a fit that diverged to NaN ends as a success"
THREAD = "getainode/ainode#186"
WARNS = r"\bnan\b|finite|inf\b"
LR = 3e37


def measured(model: nn.Module) -> Measured:
    values = torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_" in name])
    bad = int((~values.isfinite()).sum())
    return Measured(bad == 0, f"{bad} of {len(values)} values are NaN")


def ours(folder: Path) -> Measured:
    return measured(fit_ours(llama(), texts(), our_config(), steps=6, lr=LR))


def peft(folder: Path) -> Measured:
    from peft import PeftModel, get_peft_model

    trainer = fit_trainer(get_peft_model(llama(), peft_config()), texts(), folder, steps=6, lr=LR)
    trainer.save_model(str(folder / "adapter"))
    return measured(PeftModel.from_pretrained(llama(), folder / "adapter"))


def lightning(folder: Path) -> Measured:
    from peft import get_peft_model

    module = Plain(get_peft_model(llama(), peft_config()), lr=LR)
    fit_lightning(module, texts(), steps=6)
    return measured(module)
