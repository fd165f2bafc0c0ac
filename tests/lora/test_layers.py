"""What linear layers, convolutions, bare parameters, biases and DoRA do beside the laws of `test_laws.py`."""

import contextlib
import copy

import loralib
import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lightning import LoRAConfig, disabled, inject, load_adapter, merge
from lora_lightning.lora.errors import AdapterError, MergeError
from lora_lightning.lora.init.random import gaussian_, kaiming_
from lora_lightning.lora.inject import grafted_modules
from lora_lightning.lora.layers import LoRAParameter, TrainedBias, base
from lora_lightning.lora.layers.fused_linear import eager_arithmetic
from tests.lora.kinds import KINDS, Mixture, alone, inputs, net, run_six
from tests.lora.laws import check_we_open_pefts, config, stir
from tests.lora.test_fused_linear import mask_of, next_seed


def one_layer(**fields):
    """An adapted layer, trained a little."""
    model = alone(nn.Linear, 6, 5, dtype=torch.float64)
    inject(model, config(target_modules=["0"], **fields))
    return stir(model)[0]


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_touches_what_a_sees_and_leaves_w0s_input_whole(use_dora, eager):
    layer, x = one_layer(dropout=0.5, use_dora=use_dora).train(), torch.randn(64, 6, dtype=torch.float64)
    torch.manual_seed(7)
    with eager_arithmetic() if eager else contextlib.nullcontext():
        got = layer(x)
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5) if eager else 2 * x * mask_of(x, 128, next_seed())
    wanted = F.linear(x, layer.weight) + 1.5 * dropped @ layer.lora_A.T @ layer.lora_B.T
    factor = layer.dora_factor() if use_dora else 1
    torch.testing.assert_close(got, factor * wanted + layer.bias, rtol=1e-12, atol=1e-12)


def test_a_hook_that_changes_the_input_changes_what_a_sees():
    layer, x = one_layer(), torch.randn(3, 6, dtype=torch.float64)
    wanted = layer(3 * x)
    assert torch.equal(layer(input=3 * x), wanted), "by keyword too"
    layer.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("r", [4, 16])
def test_gaussian_start_has_deviation_one_by_the_root_of_the_inputs(r):
    A = gaussian_(torch.empty(r, 20_000)) * 20_000**0.5
    assert abs(float(A.std()) - 1) < 0.02
    assert abs(float(A.pow(4).mean()) - 3) < 0.15  # a uniform of that deviation has 1.8


def test_kaiming_start_is_what_loralib_draws():
    A, theirs = kaiming_(torch.empty(16, 50)), loralib.Linear(50, 40, r=16).lora_A
    for drawn in (A, theirs.detach()):
        assert 0.95 * 50**-0.5 < float(drawn.abs().max()) <= 50**-0.5
        assert float(drawn.std()) == pytest.approx(50**-0.5 / 3**0.5, rel=0.06)


def test_a_convolution_takes_one_image_without_a_batch():
    model, x = alone(nn.Conv2d, 4, 6, 3), torch.randn(4, 5, 5)
    inject(model, config(target_modules=["0"]))
    stir(model)
    assert torch.allclose(model(x), model(x[None])[0], atol=1e-6)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_pefts_update_of_a_grouped_convolution_that_no_weight_can_hold_is_refused(tmp_path):
    grouped = KINDS["Conv2d grouped"]
    with pytest.raises(AdapterError, match="reaches across groups"):
        check_we_open_pefts(grouped.make, grouped.run, peft.LoraConfig(r=2, target_modules=["1"]), tmp_path)


# Bare parameters.


def test_a_parameter_stays_under_its_name_and_is_computed_once_in_a_forward(monkeypatch):
    model = Mixture()
    W0 = model.experts.up
    inject(model, config(target_modules=[], target_parameters=["up"]))
    assert model.state_dict(keep_vars=True)["experts.up"] is W0
    assert dict(model.named_parameters())["experts.up"] is W0
    calls, updated = [], LoRAParameter.updated_weights
    monkeypatch.setattr(LoRAParameter, "updated_weights", lambda self: calls.append(1) or updated(self))
    run_six(model)
    assert len(calls) == 1
    assert not torch.equal(stir(model).experts.up, W0)
    with disabled(model):
        assert model.experts.up is W0
    again = Mixture()
    inject(again, config(target_modules=[], target_parameters=["up"]))
    again.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(run_six(again), run_six(model))
    assert again.double().experts.up.dtype == torch.float64


# Biases: `bias: all`, `bias: lora_only`, and B's own (`lora_bias`).


def test_all_trains_the_biases_that_peft_trains_with_an_ordinary_biass_gradient():
    """Parameters named `bias`: `in_proj_bias` of `nn.MultiheadAttention` is none, there and here."""
    plain = alone(nn.TransformerEncoderLayer, 8, 2, 16, dropout=0.0)
    model, x = copy.deepcopy(plain), torch.randn(3, 2, 8)
    inject(model, LoRAConfig(r=2, target_modules=["linear1"], bias="all"))
    for one in (model, plain):
        one(x).pow(3).sum().backward()
    found = dict(grafted_modules(model, TrainedBias))
    for name, module in found.items():
        torch.testing.assert_close(module.lora_trained_bias.grad, plain.get_submodule(name).bias.grad)
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["linear1"], bias="all"))
    trained = {name for name, p in theirs.named_parameters() if p.requires_grad and "lora_" not in name}
    names = {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in trained}
    assert names == {f"{name}.bias" for name in found}
    model = net()
    inject(model, LoRAConfig(r=2, target_modules=["up"], bias="all", modules_to_save=["head"]))
    assert [name for name, _ in grafted_modules(model, TrainedBias)] == ["up", "norm", "square"]


class TiedBias(nn.Module):
    """As in BERT's head: one bias under two names."""

    def __init__(self):
        super().__init__()
        self.decoder, self.inner = nn.Linear(4, 6), nn.Linear(4, 4)
        self.bias = self.decoder.bias

    def forward(self, x):
        return self.decoder(self.inner(x))


def test_a_bias_under_two_names_is_trained_once_and_stays_tied():
    model, x = TiedBias(), torch.randn(2, 4)
    inject(model, LoRAConfig(r=2, target_modules=["inner"], bias="all"))
    assert model.lora_trained_bias is model.decoder.lora_trained_bias
    expected = stir(model)(x)
    assert not merge(model).untied
    assert model.bias is model.decoder.bias
    torch.testing.assert_close(model(x), expected)


@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
def test_pefts_bias_of_b_where_the_layer_has_none_loads_and_is_refused_at_the_merge(tmp_path):
    theirs = peft.LoraConfig(r=2, lora_bias=True, target_modules=["up", "down"], init_lora_weights=False)
    peft.get_peft_model(net(), theirs).save_pretrained(tmp_path)
    model = net()
    load_adapter(model, tmp_path)
    before = model(inputs())
    opened = peft.PeftModel.from_pretrained(net(), tmp_path)
    torch.testing.assert_close(before, opened(inputs()))
    with pytest.raises(MergeError, match="lora_bias of 'down' has no bias"):
        merge(model)
    assert torch.equal(model(inputs()), before)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_pefts_adapter_that_asks_for_biases_of_a_model_without_any_loads(tmp_path, bias):
    """Every Llama saved with that setting; where a user asks for it, it stays an error."""
    model, x = alone(nn.Linear, 8, 8, bias=False), torch.randn(3, 8)
    ours = copy.deepcopy(model)
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], bias=bias, init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(x), theirs(x))


# DoRA.


def test_a_row_of_zeros_in_w0_stays_finite_and_can_learn():
    model, x = alone(nn.Linear, 5, 4), torch.ones(2, 5)
    model[0].weight.data[1] = 0
    plain = model(x)
    inject(model, config(target_modules=["0"], use_dora=True))
    out = model(x)
    assert torch.equal(out, plain)
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model[0].lora_B.grad[1].abs().sum() > 0


def test_norms_taken_in_blocks_of_rows_are_the_norms(monkeypatch):
    layer = one_layer(use_dora=True)
    whole = layer.updated_norms()
    monkeypatch.setattr(base, "BLOCK", 10)
    assert torch.equal(layer.updated_norms(), whole)
