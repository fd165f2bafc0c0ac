"""The optimizer is made before the adapters are.

adapter-hub/adapters#260: the adapter's weights did not change in training; "it looks like the optimizer is missing the
adapter parameters", since it was given the model's parameters first.
"""

from pathlib import Path

import torch

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import (
    Plain,
    b_matrices,
    fit_lightning,
    fit_ours,
    fit_trainer,
    llama,
    our_config,
    peft_config,
    texts,
    trained,
)

TITLE = "the optimizer was made before the adapters"
THREAD = "adapter-hub/adapters#260"
WARNS = "optimizer"


def measured(model) -> Measured:
    return Measured(all(bool(b.count_nonzero()) for b in b_matrices(model)), trained(model))


def ours(folder: Path) -> Measured:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return measured(fit_ours(model, texts(), our_config(), optimizer=lambda params: optimizer))


def peft(folder: Path) -> Measured:
    from peft import get_peft_model

    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model = get_peft_model(model, peft_config())
    fit_trainer(model, texts(), folder, optimizers=(optimizer, None))
    return measured(model)


def lightning(folder: Path) -> Measured:
    from peft import get_peft_model

    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    module = Plain(get_peft_model(model, peft_config()), optimizer=lambda params: optimizer)
    fit_lightning(module, texts())
    return measured(module)
