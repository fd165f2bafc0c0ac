from __future__ import annotations

import loralib
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lightning import LoRAConfig, inject, merge
from lora_lightning.lora.init.random import gaussian_, kaiming_
from lora_lightning.lora.layers.functional import wide_dtype
from lora_lightning.lora.layers.fused_linear import eager_arithmetic
from tests.factories import distance, move


def one_layer(r=2, n_in=6, n_out=5, dtype=torch.float64, *, bias=True, **fields):
    """An adapted layer inside a model, trained a little, and its scale."""
    model = nn.Sequential(nn.Linear(n_in, n_out, bias=bias, dtype=dtype))
    inject(model, LoRAConfig(r=r, target_modules=["0"], **fields))
    return move(model)[0]


def test_dropout_touches_what_a_sees_and_leaves_w0s_input_whole():
    layer = one_layer(2, 6, 5, dropout=0.5).train()
    x = torch.randn(64, 6, dtype=torch.float64)
    torch.manual_seed(7)
    with eager_arithmetic():  # torch's dropout; test_fused_linear.py has the fused form's
        got = layer(x)
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5)
    wanted = F.linear(x, layer.weight, layer.bias) + 2.0 * dropped @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    layer.eval()
    whole = F.linear(x, layer.weight, layer.bias) + 2.0 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), whole, rtol=1e-12, atol=1e-12)


def test_autocast_keeps_float32_factors_and_bfloat16_outputs():
    layer = one_layer(dtype=torch.float32)
    x = torch.randn(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert distance(out, layer(x)) < 2e-2
    out.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


class Doubled(nn.Linear):
    """A subclass with a forward and an argument of its own."""

    def forward(self, tokens, *, factor=2.0):
        return factor * super().forward(tokens)


def test_a_subclass_keeps_its_own_forward_and_arguments():
    model = nn.Sequential(Doubled(6, 5).double())
    x = torch.randn(3, 6, dtype=torch.float64)
    plain, tripled = model[0](x), model[0](x, factor=3.0)
    inject(model, LoRAConfig(r=2, target_modules=["0"]))
    assert torch.equal(model[0](x), plain)
    assert torch.equal(model[0](tokens=x, factor=3.0), tripled)
    assert isinstance(model[0], Doubled)
    adapted = move(model)(x)
    merge(model)
    torch.testing.assert_close(model(x), adapted, rtol=1e-12, atol=1e-12)


def test_a_hook_that_changes_the_input_changes_what_a_sees():
    layer = one_layer()
    x = torch.randn(3, 6, dtype=torch.float64)
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


def test_wide_dtype_is_float32_or_wider():
    def zeros(*dtypes):
        return [torch.zeros(1, dtype=dtype) for dtype in dtypes]

    assert wide_dtype(*zeros(torch.bfloat16, torch.float16)) == torch.float32
    assert wide_dtype(*zeros(torch.uint8)) == torch.float32
    assert wide_dtype(*zeros(torch.bfloat16, torch.float64)) == torch.float64
