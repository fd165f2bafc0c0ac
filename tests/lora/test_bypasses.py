"""Places where a module's weight is read and the module not called: handled, or refused by name (law 4)."""

import copy

import pytest
import torch
from torch import nn

from lora_lightning import inject, merge, remove
from lora_lightning.lora.errors import TargetError
from tests.lora.laws import config, relative, stir


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.fused
@pytest.mark.parametrize("saved", ["layers.0.linear1", "layers.1.self_attn.out_proj", "layers.0.self_attn"])
@torch.no_grad()
def test_a_module_to_save_inside_an_encoder_layer_counts_in_eval(saved):
    plain, x = encoder(), torch.randn(2, 3, 8)
    model = copy.deepcopy(plain)
    inject(model, config(target_modules=["layers.0.linear2"], modules_to_save=[saved]))
    before = model(x)
    assert torch.allclose(before, plain(x), atol=1e-5)
    for parameter in model.get_submodule(saved).lora_copy.parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))
    changed = model(x)
    assert relative(changed, before) > 1e-3
    merge(model)
    assert relative(model(x), changed) < 1e-5
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.fused
def test_a_parameter_and_a_module_of_one_attention_together():
    plain, x = encoder(), torch.randn(2, 3, 8)
    chosen = config(target_modules=["out_proj"], target_parameters=["self_attn.in_proj_weight"])
    model = copy.deepcopy(plain)
    inject(model, chosen)
    with torch.no_grad():
        stir(model)
        adapted = model(x)
    removed = remove(copy.deepcopy(model))
    assert [type(m) for m in removed.modules()] == [type(m) for m in plain.modules()]
    assert relative(removed(x), plain(x)) < 1e-6
    assert relative(adapted, plain(x)) > 1e-3
    merge(model)
    assert relative(model(x), adapted) < 1e-5
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_a_weight_that_its_parent_reads_is_adapted_as_a_parameter():
    """BEiT's attention in timm reads `qkv.weight` and does not call `qkv`."""
    from timm.models.beit import Attention

    torch.manual_seed(0)
    plain, x = nn.ModuleDict({"attn": Attention(8, 2, qkv_bias=True)}), torch.randn(2, 3, 8)
    model = copy.deepcopy(plain)
    inject(model, config(target_modules=[], target_parameters=["qkv.weight"]))
    assert torch.equal(model["attn"](x), plain["attn"](x))
    stir(model)
    adapted = model["attn"](x)
    adapted.sum().backward()
    assert model["attn"].qkv.get_submodule("lora_of_weight").lora_B.grad.any()
    merge(model)
    assert relative(model["attn"](x), adapted) < 1e-5
    assert relative(adapted, plain["attn"](x)) > 1e-3


def test_layers_to_transform_holds_for_parameters_too():
    chosen = config(target_modules=[], target_parameters=["in_proj_weight"], layers_to_transform=[1])
    assert [row.module for row in inject(encoder(), chosen).modules] == ["layers.1.self_attn.in_proj_weight"]


def test_a_lazy_layer_is_refused_by_name():
    with pytest.raises(TargetError, match="cannot adapt '0': it is lazy"):
        inject(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)), config(target_modules=["0"]))


def test_token_rows_of_a_module_to_save_are_refused():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    chosen = config(target_modules=["1"], modules_to_save=["0"], trainable_token_indices={"0": [1]})
    with pytest.raises(TargetError, match="in '0' of modules_to_save"):
        inject(model, chosen)
