"""Activation checkpointing over a frozen embedding gives adapters no gradient, while what comes after it trains.

locuslab/open-unlearning#178: with `gradient_checkpointing=True` the transformer's layers were not trained, which a
count of the `lora_B` that are not zero shows, since `enable_input_require_grads()` was missing. transformers 5 calls it
for models of texts itself; for images it does not where PEFT came first. That is torch's reentrant form, asked for
here; the head trains in full.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import (
    Plain,
    b_matrices,
    fit_lightning,
    fit_ours,
    fit_trainer,
    our_config,
    peft_config,
    trained,
)
from lora_lightning import ImageClassification

TITLE = "reentrant checkpointing of a vision model: adapters get no gradient"
THREAD = "locuslab/open-unlearning#178"
WARNS = "requires_grad=True|gradients will be none"
REENTRANT = {"use_reentrant": True}
HEAD = {"modules_to_save": ["classifier"]}


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3))


def images() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=draw), "labels": torch.tensor(i % 3)} for i in range(8)]


def measured(model: torch.nn.Module) -> Measured:
    return Measured(all(bool(b.count_nonzero()) for b in b_matrices(model)), trained(model))


def ours(folder: Path) -> Measured:
    """transformers checkpoints in training mode alone, so the backbone is put into that."""
    model = vit()
    model.activation_checkpointing_enable(REENTRANT)
    task = ImageClassification(num_classes=3)
    return measured(fit_ours(model, images(), our_config(**HEAD), task=task, backbone_mode="train"))


def peft(folder: Path) -> Measured:
    from peft import get_peft_model

    model = get_peft_model(vit(), peft_config(**HEAD))
    fit_trainer(model, images(), folder, activation_checkpointing=True, activation_checkpointing_kwargs=REENTRANT)
    return measured(model)


def lightning(folder: Path) -> Measured:
    from peft import get_peft_model

    model = get_peft_model(vit(), peft_config(**HEAD))
    model.base_model.model.activation_checkpointing_enable(REENTRANT)
    fit_lightning(Plain(model.train()), images())
    return measured(model)
