"""DoRA against the formula of arXiv 2402.09353 written out in float64, and against PEFT."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn

from lora_lightning import LoRAConfig, inject, merge, save_adapter
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.lora.layers import base
from tests.lora.kinds import KINDS, fields_of, shake
from tests.lora.test_fused_linear import mask_of, next_seed


def dora_linear(out_features, in_features, r, *, bias=True, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=bias, dtype=dtype))
    inject(model, LoRAConfig(r=r, target_modules=["0"], use_dora=True, **options))
    return model


def formula(layer, x, magnitude, A, B):
    """`x (m (W0 + s B A) / ||W0 + s B A||)^T + b`, the norm a constant."""
    moved = layer.weight.double() + layer.lora_settings.scale * (B @ A)
    norm = moved.detach().square().sum(dim=1, keepdim=True).sqrt()
    out = x @ (magnitude.unsqueeze(1) * moved / norm).T
    return out if layer.bias is None else out + layer.bias.double()


@settings(max_examples=25, deadline=None)
@given(
    out_features=st.integers(1, 9),
    in_features=st.integers(1, 9),
    r=st.integers(1, 3),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_outputs_and_gradients_are_the_formulas(out_features, in_features, r, bias, seed):
    r, rslora = min(r, out_features, in_features), seed % 2 == 0
    model = shake(dora_linear(out_features, in_features, r, bias=bias, seed=seed, use_rslora=rslora), size=0.3)
    layer = model[0]
    x = torch.randn(5, in_features, dtype=torch.float64)
    leaves = [t.detach().clone().requires_grad_() for t in (layer.lora_magnitude_vector, layer.lora_A, layer.lora_B)]
    expected = formula(layer, x, *leaves)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves)
    out = model(x)
    got = torch.autograd.grad((out * weights).sum(), [layer.lora_magnitude_vector, layer.lora_A, layer.lora_B])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    merge(model)
    torch.testing.assert_close(model(x), expected.detach(), rtol=1e-12, atol=1e-12)


def test_magnitudes_start_at_the_norms_of_w0():
    model = dora_linear(6, 5, 2)
    layer = model[0]
    torch.testing.assert_close(layer.lora_magnitude_vector.data, layer.weight.norm(dim=1), rtol=1e-14, atol=0)
    assert torch.equal(layer.dora_factor(), torch.ones(6, dtype=torch.float64))


def test_a_row_of_zeros_in_w0_stays_finite_and_can_learn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4))
    model[0].weight.data[1] = 0
    plain = model(torch.ones(2, 5))
    inject(model, LoRAConfig(r=2, target_modules=["0"], use_dora=True))
    out = model(torch.ones(2, 5))
    assert torch.equal(out, plain)
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model[0].lora_B.grad[1].abs().sum() > 0


def test_norms_taken_in_blocks_of_rows_are_the_norms(monkeypatch):
    layer = shake(dora_linear(7, 5, 2))[0]
    whole = layer.updated_norms()
    monkeypatch.setattr(base, "BLOCK", 10)
    assert torch.equal(layer.updated_norms(), whole)
    dense = layer.weight + layer.delta_weight()
    torch.testing.assert_close(whole, dense.norm(dim=1), rtol=1e-14, atol=0)


def test_dropout_is_on_the_adapters_input_alone():
    model = shake(dora_linear(6, 5, 2, dropout=0.5)).train()
    layer, x = model[0], torch.randn(3, 5, dtype=torch.float64)
    torch.manual_seed(5)
    out = model(x)
    torch.manual_seed(5)
    dropped = x * mask_of(x, 128, next_seed()) * 2
    update = dropped @ layer.lora_A.T @ layer.lora_B.T * layer.lora_settings.scale
    expected = layer.dora_factor() * (x @ layer.weight.T + update) + layer.bias
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Embedding", "Conv1D"])
def test_gradients_are_pefts(kind, tmp_path):
    entry = KINDS[kind]
    plain = entry.make().double().eval()
    model = copy.deepcopy(plain)
    inject(model, LoRAConfig(**fields_of(kind, "dora")))
    save_adapter(shake(model), tmp_path)
    theirs = PeftModel.from_pretrained(plain, tmp_path, is_trainable=True).eval()
    for one in (model, theirs):
        entry.run(one).square().sum().backward()
    for name, layer in adapted_layers(model):
        twin = dict(theirs.base_model.model.get_submodule(name).named_parameters())
        for letter in ("A", "B", "magnitude"):
            (their,) = [p for n, p in twin.items() if re.search(rf"lora_(embedding_)?{letter}", n)]
            our = layer.lora_magnitude_vector if letter == "magnitude" else getattr(layer, f"lora_{letter}")
            torch.testing.assert_close(our.grad.view(their.shape), their.grad, rtol=1e-10, atol=1e-12)
