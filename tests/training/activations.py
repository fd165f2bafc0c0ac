"""Models of several families with repeated blocks, and one step of each, which no activation option may change."""

from __future__ import annotations

import contextlib
import functools

import timm
import torch
from torch import nn

from lora_lightning import LoRAConfig, inject
from tests.factories import encoder, hf, move

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 40}
DECODER = {**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 32}
IDS = torch.randint(1, 40, (3, 8), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Own(nn.Module):
    """Blocks that pass tuples, keywords and a number on, one of them used twice."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.2)

        def forward(self, pair, *, mask=None, times=1):
            x, memory = pair
            x = x + self.down(self.drop(torch.tanh(self.up(x * mask)))) * times
            return x, memory + x

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict({"a": Own.Block(), "b": Own.Block()})
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        pair = (x, torch.zeros_like(x))
        for name in ("a", "b", "a"):
            pair = self.blocks[name](pair, mask=(x > -1).float(), times=2)
        return self.head(pair[0] + pair[1])


VIT = {"img_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 3}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 40}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
TEXT = {"input_ids": IDS}
MODELS = {
    "bert": (functools.partial(hf, "BertForSequenceClassification", **SIZES), TEXT, 2),
    "llama": (functools.partial(hf, "LlamaForCausalLM", **DECODER), TEXT, 2),
    "gpt2": (functools.partial(hf, "GPT2LMHeadModel", "GPT2Config", **GPT2), TEXT, 2),
    "t5": (functools.partial(hf, "T5ForConditionalGeneration", **T5), {**TEXT, "decoder_input_ids": IDS[:, :5]}, 4),
    "timm vit": (functools.partial(timm.create_model, "vit_tiny_patch16_224", **VIT), {"x": PIXELS}, 2),
    "timm resnet": (functools.partial(timm.create_model, "resnet18", num_classes=3), {"x": PIXELS}, 8),
    "encoder": (encoder, {"src": torch.randn(2, 5, 16)}, 2),
    "own": (Own, {"x": torch.randn(4, 8)}, 2),
}
"""The model, an input of it, and how many blocks it has."""


def adapted(name, **lora):
    """Moved away from its start, and an input."""
    torch.manual_seed(0)
    make, inputs = MODELS[name][:2]
    model = make().eval()
    targets = {"target_modules": r".*conv\d"} if "resnet" in name else {}
    inject(model, LoRAConfig(**{"r": 2, "exclude_modules": [], "target_modules": "all-linear", **targets, **lora}))
    return move(model, 0.1), inputs


def step(model, inputs, *contexts):
    """Output and gradients of one step from the same random numbers, and torch's state after it."""
    model.zero_grad()
    torch.manual_seed(3)
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        out = model(**inputs)
        out = out if isinstance(out, torch.Tensor) else out.logits
        loss = out.float().sin().sum()  # not of squares, whose sum a layer norm holds still
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return out.detach(), grads, torch.get_rng_state()


def assert_same_step(one, other):
    assert torch.equal(one[0], other[0])
    assert len(one[1]) > 2
    assert all(torch.equal(other[1][name], grad) for name, grad in one[1].items())
    assert torch.equal(one[2], other[2])
