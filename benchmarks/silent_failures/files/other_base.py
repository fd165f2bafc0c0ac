"""An adapter is loaded onto another base of the same shapes than it was trained on.

amazon-science/chronos-forecasting#432: the adapter's config has no revision, so that it "silently defaults to the main
branch of the base model"; where that was updated, results differ. Here the base is another one altogether.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.silent_failures.files.keys_of_another_class import AdapterOnly, fitted
from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import apart, fit_ours, llama, our_config, peft_config, texts
from lora_lightning import load_adapter, save_adapter

TITLE = "an adapter is loaded onto another base of the same shapes"
THREAD = "amazon-science/chronos-forecasting#432"
WARNS = "another base|other base|base model|fingerprint|revision"


def measured(trained: torch.nn.Module, loaded: torch.nn.Module) -> Measured:
    x = torch.arange(8)[None]
    off = apart(loaded.eval()(input_ids=x).logits, trained.eval()(input_ids=x).logits)
    return Measured(off < 1e-5, f"outputs are {off:.0%} off")


def ours(folder: Path) -> Measured:
    trained = fit_ours(llama(), texts(), our_config()).backbone
    save_adapter(trained, folder / "adapter")
    other = llama(seed=1)
    load_adapter(other, folder / "adapter")
    return measured(trained, other)


def peft(folder: Path) -> Measured:
    from peft import PeftModel

    trained = fitted().model
    trained.save_pretrained(folder / "adapter")
    return measured(trained, PeftModel.from_pretrained(llama(seed=1), folder / "adapter"))


def lightning(folder: Path) -> Measured:
    from peft import get_peft_model

    module = fitted()
    module.trainer.save_checkpoint(folder / "adapter.ckpt")
    other = get_peft_model(llama(seed=1), peft_config())
    return measured(module.model, AdapterOnly.load_from_checkpoint(folder / "adapter.ckpt", model=other).model)
