"""Trained biases: `bias: all`, `bias: lora_only`, and B's own (`lora_bias`)."""

import copy

import peft
import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, inject, load_adapter, merge
from lora_lightning.lora.errors import MergeError
from lora_lightning.lora.inject import grafted_modules
from lora_lightning.lora.layers import TrainedBias
from tests.lora.kinds import inputs, net, shake


def test_all_trains_every_bias_outside_modules_to_save():
    model = net()
    inject(model, LoRAConfig(r=2, target_modules=["up"], bias="all", modules_to_save=["head"]))
    assert [name for name, _ in grafted_modules(model, TrainedBias)] == ["up", "norm", "square"]


def test_gradient_is_that_of_an_ordinary_bias():
    model, plain, x = net(torch.float64), net(torch.float64), inputs(torch.float64)
    inject(model, LoRAConfig(r=2, bias="all"))
    for one in (model, plain):
        one(x).square().sum().backward()
    for name, module in grafted_modules(model, TrainedBias):
        torch.testing.assert_close(module.lora_trained_bias.grad, plain.get_submodule(name).bias.grad)


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_layer_that_reads_its_biases_sees_the_trained_ones(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first, dropout=0.0).eval()
    model, x = nn.Sequential(layer), torch.randn(2, 3, 8)
    expected = model(x)
    inject(model, LoRAConfig(r=2, target_modules=["linear1"], bias="all"))
    assert "0.self_attn.out_proj" in dict(grafted_modules(model, TrainedBias))
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-6)
        shake(model)
        moved = model(x)
    unfused = model(x)
    assert torch.allclose(moved, unfused, atol=1e-5)
    merge(model)
    with torch.no_grad():
        assert torch.allclose(model(x), moved, atol=1e-5)
    assert not torch.allclose(moved, expected, atol=1e-3)


class TiedBias(nn.Module):
    """As in BERT's head: one bias under two names."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(4, 6)
        self.bias = self.decoder.bias
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.decoder(self.inner(x))


def test_a_bias_under_two_names_is_trained_once_and_stays_tied():
    model = TiedBias()
    inject(model, LoRAConfig(r=2, target_modules=["inner"], bias="all"))
    assert model.lora_trained_bias is model.decoder.lora_trained_bias
    x = torch.randn(2, 4)
    shake(model)
    expected = model(x)
    report = merge(model)
    assert model.bias is model.decoder.bias
    assert not report.untied
    torch.testing.assert_close(model(x), expected)


def test_lora_bias_is_scaled_like_b():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    inject(model, LoRAConfig(r=2, alpha=6, target_modules=["0"], lora_bias=True))
    before = model(x)
    model[0].lora_B_bias.data += 1.0
    torch.testing.assert_close(model(x) - before, torch.full((2, 3), 3.0))


def test_pefts_directory_of_that_kind_loads_and_is_refused_at_the_merge(tmp_path):
    x = inputs()
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=2, lora_bias=True, target_modules=["up", "down"])).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    model = net().eval()
    load_adapter(model, tmp_path)
    before = model(x)
    torch.testing.assert_close(before, theirs(x))
    with pytest.raises(MergeError, match="lora_bias of 'down' has no bias"):
        merge(model)
    assert torch.equal(model(x), before)


def test_all_trains_the_biases_that_peft_trains():
    """Parameters named `bias`: `in_proj_bias` of `nn.MultiheadAttention` is none, there and here."""

    def make():
        torch.manual_seed(0)
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)

    model = make()
    inject(model, LoRAConfig(r=2, target_modules=["linear1"], bias="all"))
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["linear1"], bias="all"))
    trained = {name for name, p in theirs.named_parameters() if p.requires_grad and "lora_" not in name}
    plain = {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in trained}
    assert plain == {f"{name}.bias" for name, _ in grafted_modules(model, TrainedBias)}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_pefts_adapter_that_asks_for_biases_of_a_model_without_any_loads(tmp_path, bias):
    """Every Llama saved with that setting; where a user asks for it, it stays an error."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False)).double()
    ours = copy.deepcopy(model)
    config = peft.LoraConfig(r=2, target_modules=["0"], bias=bias, init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    x = torch.randn(3, 8).double()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
