"""Parts of fused projections: query and value only, as in the paper, where the layer is one."""

import copy

import pytest
import torch
from timm.models.vision_transformer import Attention as VisionAttention
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_lightning import inject, load_adapter, merge, save_adapter
from tests.factories import hf
from tests.lora.kinds import ONE_BLOCK, SPECS, alone
from tests.lora.laws import config, stir


def test_every_part_is_started_as_a_matrix_of_its_own():
    model = alone(nn.Linear, 512, 12)
    inject(model, config(r=4, target_modules=["0"], slices={"0": SPECS["thirds"]}))
    for part in model[0].lora_A.detach().split(4):
        assert abs(float(part.std()) * 512**0.5 - 1) < 0.1, "N(0, 1/in) in each part"


def test_ranks_and_parts_of_a_name_do_not_reach_names_that_end_in_it(tmp_path):
    def make():
        return nn.ModuleDict({"qkv": nn.Linear(6, 12), "a": nn.ModuleDict({"qkv": nn.Linear(6, 12)})})

    model, again = make(), make()
    again.load_state_dict(model.state_dict())
    chosen = {"slices": {"^qkv$": SPECS["thirds"]}, "rank_pattern": {"^qkv$": 1}, "alpha_pattern": {"^qkv$": 7.0}}
    inject(model, config(target_modules=["qkv"], **chosen))
    stir(model)
    load_adapter(again, save_adapter(model, tmp_path))
    for name in ("qkv", "a.qkv"):
        assert again.get_submodule(name).lora_settings == model.get_submodule(name).lora_settings
        assert torch.equal(again.get_submodule(name).lora_B, model.get_submodule(name).lora_B)


# The layouts that are known: what changes where only some parts are trained, seen in the model's own tensors.


PHI3 = {**ONE_BLOCK, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0}
LAYOUTS = {
    "query_key_value": lambda: hf("GPTNeoXModel", **ONE_BLOCK, vocab_size=32),
    "c_attn": lambda: hf("GPT2Model", vocab_size=32, n_embd=16, n_layer=1, n_head=2),
    "qkv_proj": lambda: hf("Phi3Model", **PHI3),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_known_layout_is_the_models_own(name, monkeypatch):
    """The three tensors that reach the attention differ exactly where they were adapted."""
    seen = []

    def spy(module, q, k, v, *args, **kwargs):
        seen.append((q, k, v))
        return torch.zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]), None

    model = LAYOUTS[name]()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "spy", spy)
    model.config._attn_implementation = "spy"
    ids = torch.arange(5)[None]
    with torch.no_grad():
        model.eval()(ids)
        for part in "qkv":
            adapted = copy.deepcopy(model)
            inject(adapted, config(target_modules=[name], slices={name: [part]}))
            stir(adapted)(ids)
            changed = [not torch.equal(a, b) for a, b in zip(seen[0], seen[-1], strict=True)]
            assert changed == [p == part for p in "qkv"]


def parts_of_bloom(attention, x):
    return attention._reshape(attention.query_key_value(x))


def parts_of_timm(attention, x):
    return attention.qkv(x).reshape(1, 3, 3, 2, 8).permute(2, 0, 3, 1, 4)


@pytest.mark.parametrize(("name", "parts"), [("query_key_value", parts_of_bloom), ("qkv", parts_of_timm)])
def test_the_known_layout_is_the_attentions_own(name, parts):
    bloom = hf("BloomModel", vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    attention = bloom.h[0].self_attention if name == "query_key_value" else VisionAttention(16, num_heads=2)
    plain = nn.ModuleDict({"attn": attention})
    x = torch.randn(1, 3, 16)
    for part in "qkv":
        model = copy.deepcopy(plain)
        inject(model, config(target_modules=[name], slices={name: [part]}))
        both = [parts(m["attn"], x) for m in (plain, stir(model))]
        assert [not torch.equal(a, b) for a, b in zip(*both, strict=True)] == [p == part for p in "qkv"]


def test_phi3s_gate_and_up():
    model, x = LAYOUTS["qkv_proj"](), torch.randn(1, 3, 16)
    fused = model.layers[0].mlp.gate_up_proj
    (gate0, up0), weight = fused(x).chunk(2, dim=-1), fused.weight.clone()
    inject(model, config(target_modules=["gate_up_proj"], slices={"gate_up_proj": ["up"]}))
    stir(model)
    gate, up = fused(x).chunk(2, dim=-1)
    assert torch.equal(gate, gate0)
    assert not torch.equal(up, up0)
    merge(model)
    assert torch.equal(fused.weight[:16], weight[:16])
