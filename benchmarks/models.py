"""Backbones of the widths that people fine-tune, from random weights, and the ways to adapt them that are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

BERT_LAYERS = ("query", "key", "value", "dense")
LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 16


def bert(width: int, layers: int = 4) -> nn.Module:
    """BERT's encoder: 384 is MiniLM's width, 768 BERT-base's."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=64,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64 if width > 384 else 12,
        intermediate_size=4 * width,
    )
    return BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)


def llama(width: int = 576, layers: int = 4) -> nn.Module:
    """Llama's decoder with SwiGLU and three query heads to each key head, as in SmolLM-135M."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 192,
        intermediate_size=8 * width // 3,
    )
    return LlamaModel(config).eval().requires_grad_(False)


BACKBONES: dict[str, tuple[Callable[[], nn.Module], int, tuple[str, ...]]] = {
    "MiniLM width": (lambda: bert(384), 384, BERT_LAYERS),
    "BERT width": (lambda: bert(768), 768, BERT_LAYERS),
    "Llama shape": (lambda: llama(576), 576, LLAMA_LAYERS),
}


def frozen(base: nn.Module, names: tuple[str, ...], dropout: float) -> nn.Module:
    """The backbone as it is: forward and dX, which nothing with a gradient to the first layer can beat."""
    return base


def ours(base: nn.Module, names: tuple[str, ...], dropout: float) -> nn.Module:
    from lora_lightning import LoRAConfig, inject

    inject(base, LoRAConfig(r=RANK, alpha=ALPHA, dropout=dropout, target_modules=list(names)))
    return base


def plain(base: nn.Module, names: tuple[str, ...], dropout: float) -> nn.Module:
    """Ours by torch's own operations: what `quick.py` is there to beat."""
    from lora_lightning.lora.quick import plain_arithmetic

    model, forward = ours(base, names, dropout), base.forward

    def plainly(*args: Any, **kwargs: Any) -> Any:
        with plain_arithmetic():
            return forward(*args, **kwargs)

    model.forward = plainly  # type: ignore[method-assign]
    return model


def peft(base: nn.Module, names: tuple[str, ...], dropout: float) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=list(names))
    return get_peft_model(base, config)  # type: ignore[arg-type]


def loralib(base: nn.Module, names: tuple[str, ...], dropout: float) -> nn.Module:
    """loralib leaves it to the user to put its layers in; here each named one is replaced."""
    import loralib as lora

    for parent in list(base.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and name in names:
                has_bias = layer.bias is not None
                new = lora.Linear(
                    layer.in_features, layer.out_features, RANK, ALPHA, dropout, bias=has_bias, dtype=layer.weight.dtype
                )
                new.load_state_dict(layer.state_dict(), strict=False)
                setattr(parent, name, new)
    lora.mark_only_lora_as_trainable(base)
    return base


VARIANTS = (frozen, ours, plain, peft, loralib)


def adapted(base: nn.Module, names: tuple[str, ...], dropout: float) -> dict[str, nn.Module]:
    """One copy of the backbone for each way, in the mode that trains the adapters and not the base's own dropout."""
    models = {}
    for variant in VARIANTS:
        model = variant(copy.deepcopy(base), names, dropout).eval()
        for name, module in model.named_modules():
            if "lora_dropout" in name or type(module).__module__.startswith("loralib"):
                module.train()  # loralib's own way to take a merged update out again
        models[variant.__name__] = model
    for model in models.values():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.01)  # B away from zero: what a step costs in mid-training
    return models


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The last hidden states (batch, length, width) of embeddings of that shape."""
    hidden: torch.Tensor = model(inputs_embeds=x).last_hidden_state
    return hidden
