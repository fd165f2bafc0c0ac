"""Parts of fused projections: query and value only, as in the paper, where the layer is one."""

import copy

import pytest
import torch
from timm.models.vision_transformer import Attention as VisionAttention
from torch import nn
from transformers.models.bloom.modeling_bloom import BloomAttention

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


# The layouts that are known: where only some parts are trained, only those of the model's own tensors differ.


PHI3 = {**ONE_BLOCK, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0}
LAYOUTS = {
    "gpt-neox": ("query_key_value", lambda: hf("GPTNeoXModel", **ONE_BLOCK, vocab_size=32)),
    "bloom": ("query_key_value", lambda: hf("BloomModel", vocab_size=32, hidden_size=16, n_layer=1, n_head=2)),
    "gpt2": ("c_attn", lambda: hf("GPT2Model", vocab_size=32, n_embd=16, n_layer=1, n_head=2)),
    "phi3": ("qkv_proj", lambda: hf("Phi3Model", **PHI3)),
    "timm": ("qkv", lambda: nn.ModuleDict({"attn": VisionAttention(16, num_heads=2)})),
}


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_known_layout_is_the_models_own(family, monkeypatch):
    """Seen in the query, key and value that reach the product."""
    name, make = LAYOUTS[family]
    plain, seen, product, split = make().eval(), [], nn.functional.scaled_dot_product_attention, BloomAttention._reshape
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, *args, **kwargs: seen.append((q, k, v)) or product(q, k, v, *args, **kwargs),
    )
    monkeypatch.setattr(BloomAttention, "_reshape", lambda self, x: seen.append(split(self, x)) or seen[-1])
    with torch.no_grad():
        run = lambda m: m["attn"](torch.ones(1, 3, 16)) if family == "timm" else m(torch.arange(5)[None])  # noqa: E731
        run(plain)
        for part in "qkv":
            adapted = copy.deepcopy(plain)
            inject(adapted, config(target_modules=[name], slices={name: [part]}))
            run(stir(adapted))
            changed = [not torch.equal(a, b) for a, b in zip(seen[0], seen[-1], strict=True)]
            assert changed == [p == part for p in "qkv"]


def test_phi3s_gate_and_up():
    model, x = LAYOUTS["phi3"][1](), torch.randn(1, 3, 16)
    fused = model.layers[0].mlp.gate_up_proj
    (gate0, up0), weight = fused(x).chunk(2, dim=-1), fused.weight.clone()
    inject(model, config(target_modules=["gate_up_proj"], slices={"gate_up_proj": ["up"]}))
    stir(model)
    gate, up = fused(x).chunk(2, dim=-1)
    assert torch.equal(gate, gate0)
    assert not torch.equal(up, up0)
    merge(model)
    assert torch.equal(fused.weight[:16], weight[:16])
