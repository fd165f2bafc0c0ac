"""`nn.MultiheadAttention`: the in-projection, whole or in parts, and the out-projection."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lightning import disabled, inject, load_adapter, merge, save_adapter
from tests.lora.kinds import NUM_HEADS, WIDTH, Attention, drawn, on, run_attention
from tests.lora.laws import (
    check_we_open_pefts,
    config,
    relative,
    stir,
)


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_input(batch_first):
    model = Attention(batch_first=batch_first)
    plain = copy.deepcopy(model)
    inject(model, config())
    x = torch.randn(3, WIDTH)
    assert torch.equal(model(x, x, x), plain(x, x, x))


@pytest.mark.parametrize("need_weights", [False, True])
def test_the_attentions_own_dropout_is_torchs_in_training(need_weights):
    model = Attention(dropout=0.4, call={"need_weights": need_weights}).requires_grad_(False).train()
    plain = copy.deepcopy(model)
    inject(model, config())
    q = k = v = drawn(3, 4, WIDTH).float()
    torch.manual_seed(3)
    want = plain(q, k, v)
    torch.manual_seed(3)
    assert torch.equal(model(q, k, v), want)


def test_all_linear_says_that_the_dropout_of_the_other_layers_is_not_theirs():
    report = inject(
        nn.Sequential(nn.TransformerEncoderLayer(WIDTH, NUM_HEADS, 16), nn.Linear(WIDTH, 2)), config(dropout=0.5)
    )
    assert {row.module: row.dropout for row in report.modules} == {
        "0.self_attn": 0.0,
        "0.self_attn.out_proj": 0.0,
        "0.linear1": 0.5,
        "0.linear2": 0.5,
    }


def test_an_adapter_that_names_a_dropout_for_all_layers_is_loaded(tmp_path):
    theirs = peft.get_peft_model(Attention(), peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["attn"]))
    theirs.save_pretrained(tmp_path)
    load_adapter(Attention(), tmp_path)


def test_the_starts_are_drawn_for_each_projection():
    torch.manual_seed(0)
    model = Attention(kdim=200, vdim=300)
    inject(model, config(target_modules=["attn"], init="kaiming"))
    a = model.attn.lora_A.split([WIDTH, 200, 300], dim=1)
    assert [round(float(part.detach().abs().max()) * part.shape[1] ** 0.5, 1) for part in a[1:]] == [1.0, 1.0]


def test_we_open_pefts_where_peft_is_right(tmp_path):
    """PEFT counts out_proj's update twice (its PR 3774), so that its A and B of out_proj are zero here."""

    def quiet(model):
        q = on(drawn(3, 4, WIDTH), model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "out_proj.lora" in name:
                    parameter.zero_()
        return model(q, q, q)

    check_we_open_pefts(Attention, quiet, peft.LoraConfig(r=2, lora_alpha=5, target_modules=["attn"]), tmp_path)


def test_out_proj_of_pefts_directory_counts_once(tmp_path):
    theirs = peft.get_peft_model(Attention(), peft.LoraConfig(r=2, lora_alpha=5, target_modules=["attn"]))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.4)
    theirs.save_pretrained(tmp_path)
    model = Attention()
    load_adapter(model, tmp_path)
    base = theirs.base_model.model.attn.base_layer.out_proj
    delta = 2.5 * base.lora_B["default"].weight @ base.lora_A["default"].weight
    assert torch.allclose(model.attn.out_proj.delta_weight(), delta, atol=1e-6)


@pytest.mark.parametrize("ranks", [{}, {"out_proj": 4}, {"attn": 4}])
@pytest.mark.parametrize("slices", [{}, {"attn": ["q", "v"]}])
@pytest.mark.parametrize("rslora", [False, True])
def test_different_ranks_and_alphas_come_back(ranks, slices, rslora, tmp_path):
    model = Attention()
    chosen = {"target_modules": ["attn", "out_proj"], "slices": slices, "use_rslora": rslora}
    inject(model, config(rank_pattern=ranks, alpha_pattern={"out_proj": 5.0}, **chosen))
    stir(model)
    again = Attention()
    load_adapter(again, save_adapter(model, tmp_path))
    for name in ("attn", "attn.out_proj"):
        ours, theirs = model.get_submodule(name), again.get_submodule(name)
        assert ours.lora_settings == theirs.lora_settings
        assert torch.allclose(ours.lora_A, theirs.lora_A)
        assert torch.allclose(ours.lora_B, theirs.lora_B)
    assert relative(run_attention(again), run_attention(model)) < 1e-6


def test_an_attention_with_a_forward_of_its_own_reads_the_adapted_weights():
    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return F.linear(F.linear(x, self.in_proj_weight)[..., :WIDTH], self.out_proj.weight) + self.out_proj(x)

    model, x = nn.Sequential(Own(WIDTH, NUM_HEADS)), torch.randn(3, WIDTH)
    before = model(x)
    inject(model, config(target_modules=["0", "out_proj"]))
    assert torch.equal(model(x), before)
    stir(model)
    adapted = model(x)
    assert relative(adapted, before) > 1e-2
    merge(model)
    assert relative(model(x), adapted) < 1e-5


@pytest.mark.parametrize("training", [False, True])
def test_a_copy_of_out_proj_is_what_attention_reads(training):
    model = nn.ModuleDict({"attention": Attention(batch_first=True), "body": nn.Linear(WIDTH, WIDTH)}).train(training)
    q = drawn(3, 4, WIDTH).float()
    plain = model["attention"](q, q, q)
    inject(model, config(target_modules=["body"], modules_to_save=["attention.attn.out_proj"]))
    assert torch.equal(model["attention"](q, q, q), plain)
    with torch.no_grad():
        model["attention"].attn.out_proj.lora_copy.bias.add_(torch.arange(float(WIDTH)))
        out = model["attention"](q, q, q)
        assert relative(out, plain) > 1e-2
        with disabled(model):
            assert torch.equal(model["attention"](q, q, q), plain)
    merge(model)
    assert torch.equal(model["attention"](q, q, q), out)
