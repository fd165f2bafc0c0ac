"""The model was compiled while it trained, and the adapter's keys carry torch.compile's prefix.

MakazhanAlpamys/Soup#335: every key began with `_orig_mod.`, `PeftModel.from_pretrained` matched none of them, the run
exited with 0, and 0 of 96 lora_B were not zero on reload. The compiler's backend is `eager` here, which takes no time.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.silent_failures.files.keys_of_another_class import AdapterOnly, measured
from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import fit_lightning, fit_ours, fit_trainer, llama, our_config, peft_config, texts
from lora_lightning import load_adapter, save_adapter

TITLE = "the adapter's keys have `torch.compile`'s prefix"
THREAD = "MakazhanAlpamys/Soup#335"
WARNS = "missing adapter keys|missing key|unexpected key|not in the model state dict"


def ours(folder: Path) -> Measured:
    save_adapter(fit_ours(llama(), texts(), our_config(), compile={"backend": "eager"}).backbone, folder / "adapter")
    fresh = llama()
    load_adapter(fresh, folder / "adapter")
    return measured(fresh)


def peft(folder: Path) -> Measured:
    from peft import PeftModel, get_peft_model

    model = get_peft_model(llama(), peft_config())
    trainer = fit_trainer(model, texts(), folder, torch_compile=True, torch_compile_backend="eager")
    trainer.save_model(str(folder / "adapter"))
    return measured(PeftModel.from_pretrained(llama(), folder / "adapter"))


def lightning(folder: Path) -> Measured:
    from peft import get_peft_model

    module = AdapterOnly(torch.compile(get_peft_model(llama(), peft_config()), backend="eager"))  # type: ignore[arg-type]
    trainer = fit_lightning(module, texts())
    trainer.save_checkpoint(folder / "adapter.ckpt")
    fresh = get_peft_model(llama(), peft_config())
    return measured(AdapterOnly.load_from_checkpoint(folder / "adapter.ckpt", model=fresh))
