"""`nn.Embedding`: padding row, max_norm, ties, and rows that train in full (`trainable_token_indices`)."""

import copy

import peft
import pytest
import torch
from safetensors import safe_open
from torch import nn

from lora_lightning import disabled, inject, load_adapter, merge
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.frozen.fingerprint import fingerprint
from tests.lora.kinds import IDS, Tied, alone, at, embedding, gemma, run_ids
from tests.lora.laws import check_training_moves_only_adapters, check_we_open_pefts, config, dtypes, stir

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


def test_merging_a_tied_embedding_leaves_the_head_as_it_was():
    model = Tied()
    inject(model, config(**at("embed")))
    stir(model)
    head = model.head.weight.detach().clone()
    assert merge(model).untied == ["embed"]
    assert torch.equal(model.head.weight, head)
    assert not torch.equal(model.embed.weight, head)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:.*tie")
def test_pefts_whole_matrix_is_this_models_or_refused(tmp_path):
    theirs = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["embed_tokens"])
    check_we_open_pefts(gemma, run_ids, theirs, tmp_path)
    with safe_open(tmp_path / "theirs" / "adapter_model.safetensors", "pt") as file:
        assert any(key.endswith("embed_tokens.base_layer.weight") for key in file.keys())  # noqa: SIM118
    other = gemma()
    nn.init.normal_(other.model.embed_tokens.weight)
    with pytest.raises(AdapterError, match=r"weight of 'model.embed_tokens' that is not this model's"):
        load_adapter(other, tmp_path / "theirs")


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


def test_merge_writes_the_rows_and_keeps_the_tie():
    model = Tied()
    inject(model, config(**at(trainable_token_indices=[1, 5])))
    trained_rows = stir(model).embed.lora_tokens.detach().clone()
    merge(model)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight[[1, 5]], trained_rows)
