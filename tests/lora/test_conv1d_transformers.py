"""transformers' `Conv1D`, the transposed linear layer of GPT-2, whole and in parts."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lora_lightning import inject
from lora_lightning.lora.errors import TargetError
from tests.lora.laws import check_laws, check_meta, check_peft_opens_ours, check_we_open_pefts, config, dtypes, stir


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = Conv1D(12, 6), Conv1D(6, 12)
        nn.init.normal_(self.up.bias)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def run(model):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64)
    return model(x.to(next(model.parameters()).dtype))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=31, n_positions=16))


def run_gpt2(model):
    return model(torch.arange(10).view(2, 5)).logits


@dtypes
def test_laws(dtype, tmp_path):
    report = check_laws(Two, run, config(target_modules=["up", "down"]), dtype, tmp_path)
    assert [row.kind for row in report.modules] == ["Conv1D", "Conv1D"]


def test_all_linear_takes_it_and_leaves_the_head():
    report = inject(gpt2(), config())
    assert len(report.modules) == 2 * 4
    assert {row.kind for row in report.modules} == {"Conv1D"}


def test_meta():
    check_meta(Two, config())


def test_output_and_gradients_are_the_formula():
    model = Two().double()
    inject(model, config(target_modules=["up"], dropout=0.0))
    stir(model)
    x = torch.randn(4, 6, dtype=torch.float64)
    up = model.up
    A, B = up.lora_A.detach().clone().requires_grad_(), up.lora_B.detach().clone().requires_grad_()
    want = x @ up.weight + up.bias + 1.5 * (x @ A.T @ B.T)
    assert torch.allclose(up(x), want, atol=1e-12)
    weights = torch.randn_like(want)
    (up(x) * weights).sum().backward()
    # dA = s B^T g^T x and dB = s g^T x A^T, written out
    assert torch.allclose(up.lora_A.grad, 1.5 * (B.T @ weights.T @ x), atol=1e-12)
    assert torch.allclose(up.lora_B.grad, 1.5 * (weights.T @ x @ A.T), atol=1e-12)


def test_dropout_is_honoured_in_training_only():
    model = Two()
    inject(model, config(dropout=0.5))
    stir(model)
    assert not torch.equal(run(model.train()), run(model))
    assert torch.equal(run(model.eval()), run(model))


def test_peft_opens_ours_and_we_open_pefts(tmp_path):
    check_peft_opens_ours(gpt2, run_gpt2, config(), tmp_path)
    parts = {"slices": {"c_attn": ["q", "v"]}, "dropout": 0.1, "use_rslora": True}
    check_peft_opens_ours(gpt2, run_gpt2, config(**parts), tmp_path / "parts")
    theirs = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    check_we_open_pefts(gpt2, run_gpt2, theirs, tmp_path)


def test_rank_is_bounded():
    with pytest.raises(TargetError, match=r"r=7 is larger than the layer 'up' allows \(6"):
        inject(Two(), config(r=7, target_modules=["up", "down"]))


def test_the_report_names_the_parts():
    report = inject(gpt2(), config(target_modules=["c_attn"], slices={"c_attn": ["q", "v"]}))
    assert {row.kind for row in report.modules} == {"Conv1D[q, v]"}
    assert {row.parameters for row in report.modules} == {2 * (2 * 16 + 16 * 2)}


def test_slices_change_only_their_rows():
    model = gpt2()
    plain = copy.deepcopy(model)
    inject(model, config(target_modules=["c_attn"], slices={"c_attn": ["q", "v"]}))
    stir(model)
    x = torch.randn(2, 16)
    attention, before = model.transformer.h[0].attn.c_attn, plain.transformer.h[0].attn.c_attn
    changed = (attention(x) != before(x)).any(dim=0)
    assert changed[:16].all()
    assert not changed[16:32].any()
    assert changed[32:].all()
