"""Backbones of the widths that people fine-tune, from random weights, and the ways to adapt them that are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BERT_LAYERS = ("query", "key", "value", "dense")
LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALPHA = 16


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


CUDA_BACKBONES: dict[str, tuple[Callable[[], nn.Module], int, tuple[str, ...]]] = {
    "Llama shape, 2048": (lambda: llama(2048, layers=2), 2048, LLAMA_LAYERS),
    "Llama shape, 4096": (lambda: llama(4096, layers=2), 4096, LLAMA_LAYERS),
}


def frozen(base: nn.Module, names: tuple[str, ...], dropout: float, r: int) -> nn.Module:
    """The backbone as it is: forward and dX, which nothing with a gradient to the first layer can beat."""
    return base


def ours(base: nn.Module, names: tuple[str, ...], dropout: float, r: int) -> nn.Module:
    from lora_lightning import LoRAConfig, inject

    inject(base, LoRAConfig(r=r, alpha=ALPHA, dropout=dropout, target_modules=list(names)))
    return base


def eager(base: nn.Module, names: tuple[str, ...], dropout: float, r: int) -> nn.Module:
    """Ours by torch's own operations: what `fused_linear.py` is there to beat."""
    from lora_lightning.lora.layers.fused_linear import eager_arithmetic

    model, forward = ours(base, names, dropout, r), base.forward

    def eagerly(*args: Any, **kwargs: Any) -> Any:
        with eager_arithmetic():
            return forward(*args, **kwargs)

    model.forward = eagerly
    return model


def compiled(base: nn.Module, names: tuple[str, ...], dropout: float, r: int) -> nn.Module:
    """The eager form under torch.compile, which ours is when compiled."""
    model = ours(base, names, dropout, r)
    model.compile()
    return model


def peft(base: nn.Module, names: tuple[str, ...], dropout: float, r: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=list(names))
    return get_peft_model(base, config)  # type: ignore[arg-type]


def loralib(base: nn.Module, names: tuple[str, ...], dropout: float, r: int) -> nn.Module:
    """loralib leaves it to the user to put its layers in; here each named one is replaced."""
    import loralib as lora

    def layer_for(old: nn.Linear) -> nn.Module:
        sizes = old.in_features, old.out_features
        new = lora.Linear(*sizes, r, ALPHA, dropout, bias=old.bias is not None)
        new.to(old.weight.device, old.weight.dtype).load_state_dict(old.state_dict(), strict=False)
        return new

    _replace(base, names, layer_for)
    lora.mark_only_lora_as_trainable(base)
    return base


class Unsloth(torch.autograd.Function):
    """The algorithm of unsloth's LoRA functions in torch's operations, one layer at a time: keeps x, A and B only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
        out = nn.functional.linear(x, W, b)
        rows = x.reshape(-1, x.shape[-1])
        out.view(-1, W.shape[0]).addmm_(rows @ A.t().to(x.dtype), B.t().to(x.dtype), alpha=s)
        ctx.save_for_backward(x, W, A, B)
        ctx.s = s
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B = ctx.saved_tensors
        a, b, rows = A.to(x.dtype), B.to(x.dtype), x.reshape(-1, x.shape[-1])
        g = grads[0].reshape(-1, W.shape[0])
        dz = g @ b
        dA, dB = (dz.t() @ rows) * ctx.s, (g.t() @ (rows @ a.t())) * ctx.s
        dx = (g @ W).addmm_(dz, a, alpha=ctx.s)
        return dx.view(x.shape), None, None, dA.to(A.dtype), dB.to(B.dtype), None


class UnslothLinear(nn.Module):
    """A frozen linear layer with A and B beside it."""

    def __init__(self, base: nn.Linear, r: int, dropout: float) -> None:
        super().__init__()
        self.base, self.scale, self.lora_dropout = base, ALPHA / r, nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.zeros(r, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Unsloth.apply(x, self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scale)
        return out


def unsloth(base: nn.Module, names: tuple[str, ...], dropout: float, r: int) -> nn.Module | None:
    """A restatement, not the package; it knows no dropout."""
    if dropout:
        return None
    _replace(base, names, lambda old: UnslothLinear(old, r, dropout))
    return base


def _replace(base: nn.Module, names: tuple[str, ...], layer_for: Callable[[nn.Linear], nn.Module]) -> None:
    for parent in list(base.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and name in names:
                setattr(parent, name, layer_for(layer))


def copied(base: nn.Module) -> nn.Module:
    """A copy that shares nothing."""
    return copy.deepcopy(base)


def adapted(
    base: nn.Module,
    names: tuple[str, ...],
    dropout: float,
    *,
    r: int = 8,
    only: tuple[str, ...] = (),
    with_compiled: bool = False,
) -> dict[str, nn.Module]:
    """One copy of the backbone for each way, in the mode that trains the adapters and not the base's own dropout."""
    ways: dict[str, Callable[..., nn.Module | None]] = {"frozen": frozen, "ours": ours, "eager form": eager}
    ways |= {"peft": peft, "loralib": loralib, "unsloth's algorithm": unsloth}
    if with_compiled:
        ways["eager form, compiled"] = compiled
    models = {}
    for way, variant in ways.items():
        model = variant(copy.deepcopy(base), names, dropout, r) if not only or way in only else None
        if model is None:
            continue
        model.eval()
        for name, module in model.named_modules():
            if "lora_dropout" in name or type(module).__module__.startswith("loralib"):
                module.train()  # loralib's own way to take a merged update out again
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.01)  # B away from zero: what a step costs in mid-training
        models[way] = model
    return models


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The last hidden states (batch, length, width) of embeddings of that shape."""
    hidden: torch.Tensor = model(inputs_embeds=x).last_hidden_state
    return hidden
