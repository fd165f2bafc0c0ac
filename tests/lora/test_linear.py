from __future__ import annotations

import loralib
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lora_lightning import LoRAConfig, inject
from lora_lightning.lora.init.random import gaussian_, kaiming_
from lora_lightning.lora.layers import LoRALinear
from lora_lightning.lora.layers.functional import lora_delta, lora_update, wide_dtype
from lora_lightning.lora.layers.fused_linear import eager_arithmetic
from tests.factories import distance, move


def one_layer(r=2, n_in=6, n_out=5, dtype=torch.float64, *, bias=True, **fields):
    """An adapted layer inside a model, trained a little, and its scale."""
    model = nn.Sequential(nn.Linear(n_in, n_out, bias=bias, dtype=dtype))
    inject(model, LoRAConfig(r=r, target_modules=["0"], **fields))
    return move(model)[0]


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    data=st.data(),
    alpha=st.floats(0.01, 100),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_forward_and_gradients_are_the_formula(shape, sizes, data, alpha, flags):
    (n_in, n_out), (rslora, bias) = sizes, flags
    r = data.draw(st.integers(1, min(n_in, n_out)))
    layer = one_layer(r, n_in, n_out, alpha=alpha, use_rslora=rslora, bias=bias)
    x = torch.randn(*shape, n_in, dtype=torch.float64, requires_grad=True)
    A, B = (t.detach().clone().requires_grad_() for t in (layer.lora_A, layer.lora_B))
    x_twin = x.detach().clone().requires_grad_()
    s = alpha / (r**0.5 if rslora else r)
    wanted = x_twin @ (layer.weight.detach() + s * (B @ A)).T + (layer.bias.detach() if bias else 0)
    got = layer(x)
    up = torch.randn_like(wanted)
    got.backward(up)
    wanted.backward(up)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    for ours, theirs in ((layer.lora_A, A), (layer.lora_B, B), (x, x_twin)):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-9)
    assert layer.weight.grad is None


def test_factors_have_the_shapes_of_the_paper_and_nothing_more_is_allocated():
    layer = one_layer(3, 6, 5)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        "weight": (5, 6),
        "bias": (5,),
        "lora_A": (3, 6),
        "lora_B": (5, 3),
    }
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer, LoRALinear)
    assert "r=3, alpha=6" in repr(layer)


def test_loralib_agrees_in_output_and_gradients():
    ours = one_layer(4, 8, 7, alpha=6.0)
    theirs = loralib.Linear(8, 7, r=4, lora_alpha=6).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 8, dtype=torch.float64)
    for layer in (ours, theirs):
        layer.train()
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    for name in ("lora_A", "lora_B"):
        torch.testing.assert_close(getattr(ours, name).grad, getattr(theirs, name).grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_agrees_in_output_and_gradients(rslora):
    ours = one_layer(4, 8, 7, alpha=6.0, use_rslora=rslora)
    base = nn.Sequential(nn.Linear(8, 7, dtype=torch.float64))
    base[0].load_state_dict({"weight": ours.weight, "bias": ours.bias})
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_rslora=rslora)
    theirs = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(ours.lora_A)
        layer.lora_B["default"].weight.copy_(ours.lora_B)
    x = torch.randn(3, 8, dtype=torch.float64)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.lora_A.grad, layer.lora_A["default"].weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.lora_B.grad, layer.lora_B["default"].weight.grad, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize(
    ("base", "factor"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2],
)
def test_factors_are_float32_or_wider_and_the_output_keeps_the_base_dtype(base, factor):
    layer = one_layer(dtype=base)
    assert layer.lora_A.dtype == layer.lora_B.dtype == factor
    out = layer(torch.randn(3, 6, dtype=base))
    assert out.dtype == base
    out.float().sum().backward()
    assert layer.lora_B.grad.dtype == factor


def test_autocast_keeps_float32_factors_and_bfloat16_outputs():
    layer = one_layer(dtype=torch.float32)
    x = torch.randn(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert distance(out, layer(x)) < 2e-2
    out.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


def test_input_by_keyword_reaches_the_adapter():
    layer = one_layer()
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(layer(input=x), layer(x))


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


def test_a_hook_that_changes_the_input_changes_what_a_sees():
    layer = one_layer()
    x = torch.randn(3, 6, dtype=torch.float64)
    wanted = layer(3 * x)
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


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_a_starts_somewhere_and_b_at_zero(init):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    inject(model, LoRAConfig(r=2, target_modules=["0", "1"], init=init))
    for layer in model:
        assert layer.lora_A.abs().min() > 0
        assert not layer.lora_B.any()
    bounded = bool((model[0].lora_A.abs() <= 6**-0.5).all() and (model[1].lora_A.abs() <= 5**-0.5).all())
    assert bounded is (init == "kaiming")


@given(r=st.integers(1, 5), scale=st.floats(-4, 4))
def test_update_and_delta_are_one_arithmetic(r, scale):
    A, B = torch.randn(r, 7, dtype=torch.float64), torch.randn(6, r, dtype=torch.float64)
    x = torch.randn(2, 7, dtype=torch.float64)
    delta = lora_delta(A, B, scale, torch.float64)
    torch.testing.assert_close(lora_update(x, A, B, scale), x @ delta.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(delta, scale * torch.einsum("or,ri->oi", B, A), rtol=1e-10, atol=1e-10)


def test_wide_dtype_is_float32_or_wider():
    def zeros(*dtypes):
        return [torch.zeros(1, dtype=dtype) for dtype in dtypes]

    assert wide_dtype(*zeros(torch.bfloat16, torch.float16)) == torch.float32
    assert wide_dtype(*zeros(torch.uint8)) == torch.float32
    assert wide_dtype(*zeros(torch.bfloat16, torch.float64)) == torch.float64
