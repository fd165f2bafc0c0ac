"""What each kind of layer does beside the laws of `test_laws.py`."""

import contextlib
import copy

import loralib
import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lightning import LoRAConfig, disabled, inject, load_adapter, merge, save_adapter
from lora_lightning.lora.errors import AdapterError, AdapterWarning, MergeError
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.init.random import gaussian_, kaiming_
from lora_lightning.lora.inject import modules_of_kind
from lora_lightning.lora.layers import LoRAParameter, TrainedBias, fused_linear
from lora_lightning.lora.layers.fused_linear import eager_arithmetic
from tests.lora.directories import of_peft
from tests.lora.kinds import (
    IDS,
    KINDS,
    WIDTH,
    Attention,
    Mixture,
    alone,
    at,
    embedding,
    inputs,
    net,
    run_attention,
    run_ids,
    run_six,
)
from tests.lora.laws import check_training_moves_only_adapters, check_we_open_pefts, config, dtypes, relative, stir
from tests.lora.test_fused_linear import mask_of, next_seed


def one_layer(**fields):
    """An adapted layer, trained a little."""
    model = alone(nn.Linear, 6, 5, dtype=torch.float64)
    inject(model, config(target_modules=["0"], **fields))
    return stir(model)[0]


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_touches_what_a_sees_and_leaves_w0s_input_whole(use_dora, eager, monkeypatch):
    monkeypatch.setattr(fused_linear, "BLOCK", 2**6)  # so that the mask is drawn in several blocks
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
    for one in (A, theirs.detach()):
        assert 0.95 * 50**-0.5 < float(one.abs().max()) <= 50**-0.5
        assert float(one.std()) == pytest.approx(50**-0.5 / 3**0.5, rel=0.06)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize("kind", ["Conv2d grouped", "Conv2d reflect", "Conv2d same"])
def test_pefts_update_of_a_convolution_that_no_weight_can_hold_is_refused(tmp_path, kind):
    with pytest.raises(AdapterError, match=r"reaches across groups|with zeros and does not dilate"):
        check_we_open_pefts(KINDS[kind].make, KINDS[kind].run, peft.LoraConfig(r=2, target_modules=["1"]), tmp_path)


# Bare parameters.


def test_a_parameters_update_is_computed_once_in_a_forward(monkeypatch):
    model, calls, updated = Mixture(), [], LoRAParameter.updated_weights
    inject(model, config(target_modules=[], target_parameters=["up"]))
    monkeypatch.setattr(LoRAParameter, "updated_weights", lambda self: calls.append(1) or updated(self))
    run_six(model)
    assert len(calls) == 1


# Biases: `bias: all`, `bias: lora_only`, and B's own (`lora_bias`).


def test_all_trains_the_biases_that_peft_trains_with_an_ordinary_biass_gradient():
    """Parameters named `bias`: `in_proj_bias` of `nn.MultiheadAttention` is none, there and here."""
    plain = alone(nn.TransformerEncoderLayer, 8, 2, 16, dropout=0.0)
    model, x = copy.deepcopy(plain), torch.randn(3, 2, 8)
    inject(model, LoRAConfig(r=2, target_modules=["linear1"], bias="all"))
    for one in (model, plain):
        one(x).pow(3).sum().backward()
    found = dict(modules_of_kind(model, TrainedBias))
    for name, module in found.items():
        torch.testing.assert_close(module.lora_trained_bias.grad, plain.get_submodule(name).bias.grad)
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["linear1"], bias="all"))
    trained = {name for name, p in theirs.named_parameters() if p.requires_grad and "lora_" not in name}
    names = {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in trained}
    assert names == {f"{name}.bias" for name in found}
    model = net()
    inject(model, LoRAConfig(r=2, target_modules=["up"], bias="all", modules_to_save=["head"]))
    assert [name for name, _ in modules_of_kind(model, TrainedBias)] == ["up", "norm", "square"]


@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
def test_pefts_bias_of_b_where_the_layer_has_none_loads_and_is_refused_at_the_merge(tmp_path):
    theirs, model = of_peft(tmp_path, net(), lora_bias=True, target_modules=["up", "down"]), net()
    load_adapter(model, tmp_path)
    before = model(inputs())
    torch.testing.assert_close(before, theirs(inputs()))
    with pytest.raises(MergeError, match="lora_bias of 'down' has no bias"):
        merge(model)
    assert torch.equal(model(inputs()), before)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_pefts_adapter_that_asks_for_biases_of_a_model_without_any_loads(tmp_path, bias):
    """Every Llama saved with that setting; where a user asks for it, it stays an error."""
    ours, x = alone(nn.Linear, 8, 8, bias=False), torch.randn(3, 8)
    theirs = of_peft(tmp_path, copy.deepcopy(ours), target_modules=["0"], bias=bias)
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


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Embedding"])
def test_a_fresh_dora_changes_nothing_under_autocast(kind):
    run, model = KINDS[kind].run, KINDS[kind].make().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = run(model)
        inject(model, config(**KINDS[kind].fields, use_dora=True))
        assert torch.equal(run(model), before)
        assert run(stir(model)).isfinite().all()


# `nn.MultiheadAttention`: the in-projection, whole or in parts, and the out-projection.


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_and_convolutions_take_one_example_without_a_batch(batch_first):
    model, x = Attention(batch_first=batch_first), torch.randn(3, WIDTH)
    plain = copy.deepcopy(model)
    inject(model, config())
    assert torch.equal(model(x, x, x), plain(x, x, x))
    convolution, image = alone(nn.Conv2d, 4, 6, 3), torch.randn(4, 5, 5)
    inject(convolution, config(target_modules=["0"]))
    assert torch.allclose(stir(convolution)(image), convolution(image[None])[0], atol=1e-6)


@pytest.mark.parametrize("need_weights", [False, True])
def test_the_attentions_own_dropout_is_torchs_in_training(need_weights):
    model = Attention(dropout=0.4, call={"need_weights": need_weights}).requires_grad_(False).train()
    plain, x = copy.deepcopy(model), torch.randn(3, 4, WIDTH)
    inject(model, config())
    torch.manual_seed(3)
    want = plain(x, x, x)
    torch.manual_seed(3)
    assert torch.equal(model(x, x, x), want)


def test_the_starts_are_drawn_for_each_projection():
    model = Attention(kdim=200, vdim=300)
    inject(model, config(target_modules=["attn"], init="kaiming"))
    a = model.attn.lora_A.split([WIDTH, 200, 300], dim=1)
    assert [round(float(part.detach().abs().max()) * part.shape[1] ** 0.5, 1) for part in a[1:]] == [1.0, 1.0]


def test_pefts_directory_is_read_of_which_peft_itself_counts_out_proj_twice(tmp_path):
    """Its PR 3774."""
    attention, model = of_peft(tmp_path, Attention(), target_modules=["attn"]).base_model.model.attn, Attention()
    with pytest.warns(AdapterWarning, match=r"twice the update in 'attn.out_proj'"):
        load_adapter(model, tmp_path)
    for name, theirs in (("attn", attention), ("attn.out_proj", attention.base_layer.out_proj)):
        update = 2.5 * theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
        assert torch.allclose(model.get_submodule(name).delta_weight(), update, atol=1e-6)


@pytest.mark.parametrize("ranks", [{}, {"out_proj": 4}, {"attn": 4}])
@pytest.mark.parametrize("more", [{"use_rslora": True}, {"slices": {"attn": ["q", "v"]}}])
def test_different_ranks_and_alphas_come_back(ranks, more, tmp_path):
    model, again = Attention(), Attention()
    inject(model, config(**at("attn", "out_proj"), rank_pattern=ranks, alpha_pattern={"out_proj": 5.0}, **more))
    load_adapter(again, save_adapter(stir(model), tmp_path))
    for name in ("attn", "attn.out_proj"):
        assert again.get_submodule(name).lora_settings == model.get_submodule(name).lora_settings
    assert relative(run_attention(again), run_attention(model)) < 1e-6


# `nn.Embedding`: padding row, max_norm, ties, and rows that train in full (`trainable_token_indices`).


OF_TABLE = config(**at("0"))


@dtypes
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0])
def test_a_fresh_adapter_cuts_norms_as_torch_does_and_does_not_rewrite_w0(norm_type, dtype):
    plain = alone(nn.Embedding, 11, 6, max_norm=0.5, norm_type=norm_type).to(dtype)
    model = copy.deepcopy(plain)
    inject(model, OF_TABLE)
    before, fresh = fingerprint(model).digest, model(IDS)
    assert torch.equal(fresh, plain(IDS))
    out = stir(model)(IDS)
    with disabled(model):
        assert torch.equal(model(IDS), fresh)
    assert fingerprint(model).digest == before
    assert (out.float().norm(p=norm_type, dim=-1) <= 0.5 + (1e-5 if dtype != torch.bfloat16 else 1e-2)).all()


def test_the_padding_row_and_rows_that_were_never_seen_keep_their_values():
    model = embedding(padding_idx=0)
    inject(model, OF_TABLE)
    check_training_moves_only_adapters(model, run_ids, steps=5)
    assert not model[0].lora_A.grad[:, 0].any()
    for row in (0, 3):
        assert torch.equal(model[0](torch.tensor([row]))[0], model[0].weight[row])
    merge(model)
    assert not model[0].weight[0].any()


@pytest.mark.parametrize("by_count", [False, True])
def test_gradients_are_the_formulas_with_padding_and_by_count(by_count):
    model = alone(nn.Embedding, 11, 6, padding_idx=0, scale_grad_by_freq=by_count).double()
    inject(model, OF_TABLE)
    layer = stir(model)[0]
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    weights = torch.randn(*IDS.shape, 6, dtype=torch.float64)
    (model(IDS) * weights).sum().backward()
    want_a, want_b = torch.zeros_like(A), torch.zeros_like(B)
    counts = torch.bincount(IDS.flatten(), minlength=11)
    for token, g in zip(IDS.flatten().tolist(), weights.reshape(-1, 6), strict=True):
        want_b += 1.5 * torch.outer(g, A[:, token])
        if token != 0:
            want_a[:, token] += 1.5 * (B.T @ g) / (counts[token] if by_count else 1)
    assert torch.allclose(layer.lora_A.grad, want_a, atol=1e-12)
    assert torch.allclose(layer.lora_B.grad, want_b, atol=1e-12)


def test_dropout_keeps_or_drops_whole_updates():
    model, ids = alone(nn.Embedding, 11, 6), torch.arange(11)
    base = model(ids)
    inject(model, config(**at("0"), dropout=0.5))
    full = stir(model).eval()(ids) - base
    dropped = model.train()(ids) - base
    kept = dropped.abs().sum(dim=-1) > 0
    assert 0 < kept.sum() < 11
    assert torch.allclose(dropped[kept], 2 * full[kept], atol=1e-5)


def test_only_the_chosen_rows_differ_and_gradients_are_the_formulas():
    model, ids = embedding().double(), torch.arange(9)
    plain = model[0](ids)
    inject(model, config(**at(trainable_token_indices=[7, 1, 8])))
    changed = (stir(model)[0](ids) != plain).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [1, 7, 8]
    weights = torch.randn(*IDS.shape, 6, dtype=torch.float64)
    (model[0](IDS) * weights).sum().backward()
    want = torch.stack([weights[token == IDS].sum(0) for token in (1, 7, 8)])
    assert torch.allclose(model[0].lora_tokens.grad, want, atol=1e-12)
