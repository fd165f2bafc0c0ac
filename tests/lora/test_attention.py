"""`nn.MultiheadAttention`: the in-projection, whole or in parts, and the out-projection."""

import copy

import peft
import pytest
import torch
from torch import nn

from lora_lightning import inject, load_adapter, save_adapter
from tests.lora.kinds import NUM_HEADS, WIDTH, Attention, alone, drawn, on, run_attention
from tests.lora.laws import check_we_open_pefts, config, relative, stir


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_input(batch_first):
    model, x = Attention(batch_first=batch_first), torch.randn(3, WIDTH)
    plain = copy.deepcopy(model)
    inject(model, config())
    assert torch.equal(model(x, x, x), plain(x, x, x))


@pytest.mark.parametrize("need_weights", [False, True])
def test_the_attentions_own_dropout_is_torchs_in_training(need_weights):
    model = Attention(dropout=0.4, call={"need_weights": need_weights}).requires_grad_(False).train()
    plain, x = copy.deepcopy(model), torch.randn(3, 4, WIDTH)
    inject(model, config())
    torch.manual_seed(3)
    want = plain(x, x, x)
    torch.manual_seed(3)
    assert torch.equal(model(x, x, x), want)


def test_all_linear_says_that_the_dropout_of_the_other_layers_is_not_theirs():
    model = alone(nn.TransformerEncoderLayer, WIDTH, NUM_HEADS, 16).append(nn.Linear(WIDTH, 2))
    report = inject(model, config(dropout=0.5))
    rates = {"0.self_attn": 0.0, "0.self_attn.out_proj": 0.0, "0.linear1": 0.5, "0.linear2": 0.5}
    assert {row.module: row.dropout for row in report.modules} == rates


def test_the_starts_are_drawn_for_each_projection():
    model = Attention(kdim=200, vdim=300)
    inject(model, config(target_modules=["attn"], init="kaiming"))
    a = model.attn.lora_A.split([WIDTH, 200, 300], dim=1)
    assert [round(float(part.detach().abs().max()) * part.shape[1] ** 0.5, 1) for part in a[1:]] == [1.0, 1.0]


PEFTS = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["attn"], lora_dropout=0.1)


def test_we_open_pefts_where_peft_is_right(tmp_path):
    """PEFT counts out_proj's update twice (its PR 3774), so that its A and B of out_proj are zero here."""

    def quiet(model):
        q = on(drawn(3, 4, WIDTH), model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "out_proj.lora" in name:
                    parameter.zero_()
        return model(q, q, q)

    check_we_open_pefts(Attention, quiet, PEFTS, tmp_path)


def test_out_proj_of_pefts_directory_counts_once(tmp_path):
    theirs = peft.get_peft_model(Attention(), copy.deepcopy(PEFTS))
    base = theirs.base_model.model.attn.base_layer.out_proj
    A, B = (part["default"].weight.requires_grad_(False).normal_(std=0.4) for part in (base.lora_A, base.lora_B))
    theirs.save_pretrained(tmp_path)
    model = Attention()
    load_adapter(model, tmp_path)
    assert torch.allclose(model.attn.out_proj.delta_weight(), 2.5 * B @ A, atol=1e-6)


@pytest.mark.parametrize("ranks", [{}, {"out_proj": 4}, {"attn": 4}])
@pytest.mark.parametrize("more", [{"use_rslora": True}, {"slices": {"attn": ["q", "v"]}}])
def test_different_ranks_and_alphas_come_back(ranks, more, tmp_path):
    model, again = Attention(), Attention()
    inject(
        model, config(target_modules=["attn", "out_proj"], rank_pattern=ranks, alpha_pattern={"out_proj": 5.0}, **more)
    )
    load_adapter(again, save_adapter(stir(model), tmp_path))
    for name in ("attn", "attn.out_proj"):
        ours, theirs = model.get_submodule(name), again.get_submodule(name)
        assert ours.lora_settings == theirs.lora_settings
        assert torch.allclose(ours.lora_A, theirs.lora_A)
        assert torch.allclose(ours.lora_B, theirs.lora_B)
    assert relative(run_attention(again), run_attention(model)) < 1e-6
