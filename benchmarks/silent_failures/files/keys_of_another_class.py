"""An adapter was trained on one class of the model and is loaded into another, whose modules have other names.

huggingface/peft#2566: trained on `AutoModelForCausalLM` and loaded into `MllamaForConditionalGeneration`, none of the
keys matched, PEFT warned and went on ("this warning means not loading lora params?"). In vLLM it was silent
(vllm-project/vllm#34186).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaModel

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import (
    Plain,
    b_matrices,
    fit_lightning,
    fit_ours,
    llama,
    our_config,
    peft_config,
    texts,
)
from lora_lightning import load_adapter, save_adapter

TITLE = "the adapter's keys have another class's names"
THREAD = "huggingface/peft#2566"
WARNS = "missing adapter keys|missing key|unexpected key|not in the model state dict"


def measured(model: torch.nn.Module) -> Measured:
    matrices = b_matrices(model)
    count = sum(bool(b.count_nonzero()) for b in matrices)
    return Measured(count == len(matrices) == 4, f"{count} of {len(matrices)} adapters loaded")


def ours(folder: Path) -> Measured:
    save_adapter(fit_ours(llama(), texts(), our_config()).backbone, folder / "adapter")
    other = llama(cls=LlamaModel)
    load_adapter(other, folder / "adapter")
    return measured(other)


def peft(folder: Path) -> Measured:
    from peft import PeftModel

    fitted().model.save_pretrained(folder / "adapter")
    return measured(PeftModel.from_pretrained(llama(cls=LlamaModel), folder / "adapter"))


def fitted() -> Any:
    from peft import get_peft_model

    module = AdapterOnly(get_peft_model(llama(), peft_config()))
    fit_lightning(module, texts())
    return module


class AdapterOnly(Plain):
    """Saves what trains and loads it without the rest, as Lightning's documentation on `strict_loading` does."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.strict_loading = False

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "lora_" in name}


def lightning(folder: Path) -> Measured:
    from peft import get_peft_model

    module = fitted()
    module.trainer.save_checkpoint(folder / "adapter.ckpt")
    other = get_peft_model(llama(cls=LlamaModel), peft_config())
    return measured(AdapterOnly.load_from_checkpoint(folder / "adapter.ckpt", model=other))
