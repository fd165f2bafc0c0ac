"""A model whose blocks are compiled or wrapped in DataParallel goes by the names of the plain model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lora_lightning import LoRAConfig, inject, load_adapter, merge, save_adapter
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.frozen.tensors import (
    adapter_tensors,
    base_tensors,
    frozen_keys,
    get_module,
    named_modules,
    plain_name,
)
from lora_lightning.lora.inject import adapted_layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(8, 8)  # a name that DataParallel uses too
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.out(self.module(x).relu())


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.LayerNorm(8))


def compiled(block: nn.Module) -> nn.Module:
    return torch.compile(block, backend="eager")


WRAPS = {
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "recomputed": checkpoint_wrapper,
    "both": lambda block: nn.DataParallel(compiled(block)),
}


def wrapped(wrap) -> nn.Module:
    whole = model()
    whole[0] = WRAPS[wrap](whole[0])
    return whole


@pytest.mark.parametrize("wrap", WRAPS)
def test_wrapped_blocks_have_the_plain_models_names(wrap):
    plain, own = model(), wrapped(wrap)
    config = LoRAConfig(r=2, target_modules=["module", "0.out"], modules_to_save=["1.out"])
    for one in (plain, own):
        inject(one, config)
    assert list(adapter_tensors(own)) == list(adapter_tensors(plain))
    assert list(base_tensors(own)) == list(base_tensors(plain))
    assert frozen_keys(own) == frozen_keys(plain)
    assert fingerprint(own) == fingerprint(plain)
    assert [name for name, _ in adapted_layers(own)] == [name for name, _ in adapted_layers(plain)]
    assert [name for name, _ in named_modules(own)] == [name for name, _ in named_modules(plain)]
    assert all(get_module(own, name) is module for name, module in named_modules(own))
    x = torch.randn(3, 8)
    assert torch.equal(own(x), plain(x))


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("options", [{"modules_to_save": ["1.out"], "bias": "lora_only"}, {"use_dora": True}], ids=str)
@torch.no_grad()
def test_an_adapter_travels_between_wrapped_and_plain_models(wrap, options, tmp_path):
    own, x = wrapped(wrap), torch.randn(3, 8)
    inject(own, LoRAConfig(r=2, **options))
    for parameter in own.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(own, tmp_path)
    for other in (model(), wrapped(wrap)):
        load_adapter(other, tmp_path)
        assert torch.equal(other(x), own(x))
    adapted = own(x)
    merge(own)
    assert torch.allclose(own(x), adapted, rtol=1e-5, atol=1e-6)


def test_a_wrapped_whole_model_has_the_plain_models_names():
    own = nn.DataParallel(model())
    inject(own, LoRAConfig(r=2))
    assert [name for name, _ in adapted_layers(own)] == ["0.module", "0.out", "1.module", "1.out"]
    assert plain_name(own, "module.0.module.weight") == "0.module.weight"


def test_a_module_that_is_called_module_keeps_its_name():
    assert plain_name(model(), "0.module.weight") == "0.module.weight"
