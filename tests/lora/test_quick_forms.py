"""Quick DoRA, biases, slices, starts, convolutions and embeddings are their plain forms, and keep what they say."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_lightning import LoRAConfig, inject, merge
from lora_lightning.lora import norms, quick_conv, quick_embedding
from lora_lightning.lora.channels import add_through_channels_, sum_over_places, through_channels
from lora_lightning.lora.drops import Dropout
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.lora.layers import fused_linear as quick
from lora_lightning.lora.layers.dora import rescale, updated_row_norms
from lora_lightning.lora.layers.fused_linear import plain_arithmetic
from lora_lightning.lora.norms import thin_row_norms
from lora_lightning.lora.quick_conv import Slide
from lora_lightning.lora.quick_conv import quick_conv as convolved
from lora_lightning.lora.quick_embedding import add_looked_up_
from lora_lightning.lora.rescale import rescale_
from tests.lora.test_quick import TOLERANCE, Three, kept

DTYPES = list(TOLERANCE)
PARTS = {"0": {"of": ["q", "k", "v"], "take": ["q", "v"], "heads": 2}}
THIRDS = {"0": {"of": ["q", "k", "v"], "take": ["q", "v"]}}

OPTIONS: dict[str, dict[str, object]] = {
    "dora": {"use_dora": True},
    "dora and biases": {"use_dora": True, "bias": "all"},
    "biases": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "lora_bias and biases": {"lora_bias": True, "bias": "all"},
    "slices": {"slices": PARTS},
    "start": {"init": "pissa"},
    "start and dora": {"init": "olora", "use_dora": True},
}


class Case:
    """A layer, what it is called with, and the options under which it is adapted."""

    def __init__(self, make: Callable[[], nn.Module], size: tuple[int, ...], ids: bool = False, **options: object):
        self.make, self.size, self.ids, self.options = make, size, ids, options

    def model(self, dtype: torch.dtype = torch.float64, **more: object) -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(self.make()).to(dtype)
        inject(model, LoRAConfig(r=2, target_modules=["0"], **{**self.options, **more}))  # type: ignore[arg-type]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return model

    def x(self, dtype: torch.dtype = torch.float64) -> Tensor:
        torch.manual_seed(2)
        return torch.randint(0, 9, self.size) if self.ids else torch.randn(self.size).to(dtype)


def conv(dims: int = 2, size: int = 4, **options: object) -> Case:
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    kernel = options.pop("kernel", 3)
    given = {name: options.pop(name) for name in ("use_dora", "bias") if name in options}
    return Case(lambda: layer(4, 6, kernel, **options), (2, 4, *[size] * dims), **given)  # type: ignore[arg-type]


CASES: dict[str, Case] = {
    **{name: Case(lambda: nn.Linear(8, 12), (2, 5, 8), **options) for name, options in OPTIONS.items()},
    "dora without a bias": Case(lambda: nn.Linear(8, 12, bias=False), (7, 8), use_dora=True),
    "conv": conv(),
    "conv strided": conv(stride=2, padding=1, dilation=2, size=9),
    "conv in groups": conv(groups=2, padding=1),
    "conv 1x1": conv(kernel=1),
    "conv 1x1 strided": conv(kernel=1, stride=2),
    "conv 1d, same": conv(1, kernel=4, padding="same"),
    "conv 3d": conv(3, kernel=2),
    "conv reflected": conv(padding=2, padding_mode="reflect"),
    "conv circular, same": conv(kernel=2, padding="same", padding_mode="circular"),
    "conv dora": conv(use_dora=True),
    "conv dora and biases": conv(use_dora=True, bias="all"),
    "conv in groups, dora": conv(groups=2, use_dora=True),
    "embedding": Case(lambda: nn.Embedding(9, 5), (3, 4), ids=True),
    "embedding padded": Case(lambda: nn.Embedding(9, 5, padding_idx=3), (3, 4), ids=True),
    "embedding dora": Case(lambda: nn.Embedding(9, 5), (3, 4), ids=True, use_dora=True),
}
cases = pytest.mark.parametrize("name", CASES)
some = pytest.mark.parametrize(
    "name", ["dora and biases", "lora_bias", "start and dora", "slices", "conv", "conv dora", "embedding dora"]
)
"""For what takes long and does not differ between the others."""


def everything(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, dX where x is no number of a row, and the gradient of every trained parameter."""
    model.zero_grad()
    whole = not x.is_floating_point()
    x = x if whole else x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = model(x if whole else x * 1.0)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    (out.double() * weights).sum().backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    found = [out.detach(), *([] if whole else [x.grad]), *trained]
    assert all(t is not None for t in found)
    return [t for t in found if t is not None]


def assert_alike(ours: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, wanted, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        largest = max(1.0, float(b.double().abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * largest)


def compare(model: nn.Module, x: Tensor, tolerance: float) -> None:
    ours = everything(model, x)
    with plain_arithmetic():
        assert_alike(ours, everything(model, x), tolerance)


@cases
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quick_form_is_its_plain_form(name: str, dtype: torch.dtype) -> None:
    compare(CASES[name].model(dtype), CASES[name].x(dtype), TOLERANCE[dtype])


@cases
def test_it_is_another_way_than_the_plain_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the comparisons here would compare a thing with itself."""
    called: list[str] = []
    for function in (quick._First, quick_conv._QuickConv, quick_embedding._AddLookedUp):
        forward = function.forward
        counted = staticmethod(lambda *args, forward=forward: (called.append(""), forward(*args))[1])
        monkeypatch.setattr(function, "forward", counted)
    model, x = CASES[name].model(), CASES[name].x()
    assert {layer.arithmetic() for _, layer in adapted_layers(model)} == {"quick"}
    with plain_arithmetic():
        model(x)
    assert not called
    model(x)
    assert called


@cases
def test_a_fresh_adapter_leaves_every_bit(name: str) -> None:
    case = CASES[name]
    for dtype in DTYPES:
        torch.manual_seed(1)
        model = nn.Sequential(case.make()).to(dtype)
        plain = model(case.x(dtype))
        inject(model, LoRAConfig(r=2, target_modules=["0"], **case.options))  # type: ignore[arg-type]
        assert torch.equal(model(case.x(dtype)), plain)


@cases
def test_merged_equals_adapted(name: str) -> None:
    model, x = CASES[name].model(), CASES[name].x()
    adapted = model(x)
    merge(model)
    torch.testing.assert_close(model(x), adapted, rtol=1e-12, atol=1e-12)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_plain_form_to_rounding(name: str, dtype: torch.dtype) -> None:
    model, x = CASES[name].model(dtype), CASES[name].x(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        compare(model, x, TOLERANCE[torch.bfloat16])


@cases
def test_gradcheck_once_and_twice(name: str) -> None:
    case = CASES[name]
    model, x = case.model(), case.x()
    if case.ids:
        x[x == 3] = 4  # the padding row's gradient is not its derivative
    else:
        x = x[:1].requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]

    def call(x: Tensor, *steps: Tensor) -> Tensor:
        moved = {n: p for n, p in model.named_parameters() if p.requires_grad}
        return torch.func.functional_call(model, dict(zip(moved, steps, strict=True)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in trained))
    if "dora" in name:  # the norm is a constant in backward, so that only what it is a constant of can be checked
        frozen = [layer.dora_factor().detach() for _, layer in adapted_layers(model)]
        layer = model[0]
        magnitude = layer.lora_magnitude_vector.detach()
        layer.dora_factor = lambda: frozen[0] * (layer.lora_magnitude_vector / magnitude)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@some
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_the_same(name: str, reentrant: bool) -> None:
    """Under dropout too, whose mask is drawn again."""
    case = CASES[name]
    model, x = case.model(dropout=0.4).train(), case.x()
    hidden = torch.zeros((), dtype=torch.float64, requires_grad=True)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            # The zero lets the reentrant form see something that needs a gradient.
            return checkpoint(lambda x, h: self.inner(x) + h, x, hidden, use_reentrant=reentrant)

    torch.manual_seed(3)
    wanted = everything(model, x)
    torch.manual_seed(3)
    assert_alike(everything(Checkpointed(), x), wanted, 1e-12)


@some
def test_compiled_it_is_the_same_without_a_graph_break(name: str) -> None:
    model, x = CASES[name].model(), CASES[name].x()
    wanted = everything(model, x)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    assert_alike(everything(compiled, x), wanted, 1e-12)
    torch.compiler.reset()


@cases
def test_twice_in_one_graph_and_its_output_changed_in_place(name: str) -> None:
    model, case = CASES[name].model(), CASES[name]
    inner = model[0]

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.inner(x).relu_(), self.inner(x)
            second[..., :2] += 1
            return first * second

    compare(Twice(), case.x(), 1e-12)


@cases
def test_empty_batches_and_inputs_in_any_order_in_memory(name: str) -> None:
    case = CASES[name]
    model, x = case.model(), case.x()
    compare(model, x[:0], 1e-12)
    compare(model, x.transpose(0, -1).contiguous().transpose(0, -1), 1e-12)
    compare(model, x[:1].expand(3, *x.shape[1:]), 1e-12)
    if x.dim() == 4:
        compare(model, x.to(memory_format=torch.channels_last), 1e-12)
        compare(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last), 1e-12)
    if not case.ids:
        compare(model, x[0], 1e-12)


@cases
def test_no_gradient_where_none_is_wanted(name: str) -> None:
    case = CASES[name]
    model, x = case.model(), case.x()
    for frozen in ("lora_A", "lora_B", "lora_magnitude_vector", "lora_trained_bias", "lora_B_bias"):
        parameter = model[0]._parameters.get(frozen)
        if parameter is None:
            continue
        parameter.requires_grad_(False)
        model.zero_grad()
        model(x).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert f"0.{frozen}" not in grads
        with plain_arithmetic():
            model.zero_grad()
            model(x).sum().backward()
        assert_alike(list(grads.values()), [p.grad for p in model.parameters() if p.grad is not None], 1e-12)
        parameter.requires_grad_(True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            ours = model(x)
            with plain_arithmetic():
                torch.testing.assert_close(ours, model(x), rtol=1e-12, atol=1e-12)


# What backward keeps.


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_keeps_the_input_once_and_one_tensor_of_its_width(dropout: float, dtype: torch.dtype) -> None:
    model = Three(64, 48).to(dtype)
    inject(model, LoRAConfig(r=3, target_modules=".+", use_dora=True, dropout=dropout))
    x, (n, r, m) = torch.randn(50, 64, dtype=dtype, requires_grad=True) * 1.0, (50, 3, 48)
    # z, what is rescaled, and the m factors as they came and as they went into the product
    assert kept(model.train(), x) <= 3 * x.element_size() * (n * r + n * m + m) + 3 * 4 * 4 * m


@pytest.mark.parametrize("options", [{"bias": "all"}, {"lora_bias": True}], ids=str)
def test_trained_biases_keep_nothing(options: dict[str, object]) -> None:
    model = Three(64, 48)
    inject(model, LoRAConfig(r=3, target_modules=".+", **options))  # type: ignore[arg-type]
    assert kept(model, torch.randn(50, 64, requires_grad=True) * 1.0) == 3 * 4 * 50 * 3


def test_a_start_and_parts_keep_what_is_of_rank_size() -> None:
    n, k, m, r = 50, 64, 48, 2
    x = torch.randn(n, k, requires_grad=True) * 1.0
    model = nn.Sequential(nn.Linear(k, m))
    inject(model, LoRAConfig(r=r, target_modules=["0"], init="olora"))
    assert kept(model, x) == 4 * 2 * r * (n + k + m)
    parts = nn.Sequential(nn.Linear(k, m))
    inject(parts, LoRAConfig(r=r, target_modules=["0"], slices=PARTS))
    assert kept(parts, x) == 4 * 2 * r * (n + m)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_keeps_its_input_once_and_rank_sized_numbers(
    dropout: float, dtype: torch.dtype, kernel: int
) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, kernel, padding=kernel // 2)).to(dtype)
    inject(model, LoRAConfig(r=2, target_modules=["0"], dropout=dropout))
    x = torch.randn(5, 4, 8, 8, dtype=dtype, requires_grad=True) * 1.0
    assert kept(model.train(), x) == x.element_size() * 5 * 2 * 8 * 8


def test_what_is_padded_in_an_own_way_is_padded_once() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"))
    inject(model, LoRAConfig(r=2, target_modules=["0"]))
    assert kept(model, torch.randn(5, 4, 8, 8, requires_grad=True) * 1.0) == 4 * 5 * (4 * 10 * 10 + 2 * 8 * 8)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_embedding_keeps_rank_sized_numbers(dropout: float) -> None:
    model = nn.Sequential(nn.Embedding(9, 32))
    inject(model, LoRAConfig(r=2, target_modules=["0"], dropout=dropout))
    ids = torch.randint(0, 9, (5, 4))
    assert kept(model.train(), ids) == 20 * (4 * 2 + bool(dropout))


# The pieces, against formulas.


def test_conv_with_dropout_is_the_formula_with_its_mask() -> None:
    torch.manual_seed(0)
    x, W = torch.randn(3, 4, 6, 6, dtype=torch.float64, requires_grad=True), torch.randn(6, 4, 3, 3).double()
    A = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    B = torch.randn(6, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(7)
    out = convolved(x, W, None, A, B, 0.7, Slide((1, 1), (1, 1), (1, 1), 1), 0.25)
    torch.manual_seed(7)
    mask = (
        Dropout(64, int(torch.randint(2**62, (), dtype=torch.int64))).keep(x.view(3, -1)).view(x.shape).double() / 0.75
    )
    delta = torch.einsum("or,rikl->oikl", B[..., 0, 0], A)
    wanted = F.conv2d(x, W, padding=1) + 0.7 * F.conv2d(x * mask, delta, padding=1)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, (x, A, B), g), torch.autograd.grad(wanted, (x, A, B), g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_embedding_is_the_formula() -> None:
    torch.manual_seed(0)
    W, ids = torch.randn(9, 5).double(), torch.randint(0, 9, (4, 3))
    A = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    B = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(7)
    out = add_looked_up_(W[ids], ids, A, B, 0.7, padding_idx=2, dropout=0.25)
    torch.manual_seed(7)
    keep = (
        Dropout(64, int(torch.randint(2**62, (), dtype=torch.int64))).keep(ids.view(1, -1)).view(4, 3, 1).double()
        / 0.75
    )
    wanted = W[ids] + 0.7 * keep * (F.one_hot(ids, 9).double() @ A.t()) @ B.t()
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(out)
    (dA, dB), (a, b) = torch.autograd.grad(out, (A, B), g), torch.autograd.grad(wanted, (A, B), g)
    a[:, 2] = 0  # the padding row's, as in nn.Embedding
    torch.testing.assert_close(dA, a, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dB, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("last", [False, True])
def test_products_through_channels_are_convolutions_of_size_one(groups: int, last: bool) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 4, 5, 7).double(), torch.randn(3, 6, 5, 7).double()
    if last:
        x, y = x.to(memory_format=torch.channels_last), y.to(memory_format=torch.channels_last)
    M = torch.randn(6, 4 // groups).double()
    kernel = M.view(6, -1, 1, 1).requires_grad_()
    wanted = F.conv2d(x, kernel, groups=groups)
    torch.testing.assert_close(through_channels(M, x, groups), wanted.detach())
    if groups == 1 or not last:
        torch.testing.assert_close(add_through_channels_(y.clone(), M, x, groups), y + wanted.detach())
    (dM,) = torch.autograd.grad(wanted, kernel, y)
    torch.testing.assert_close(sum_over_places(y, x, groups), dM.view(6, -1))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 12)])
def test_rescaling_in_place_is_the_plain_formula(with_bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    h, factor = torch.randn(shape).double().requires_grad_(), torch.rand(12).double().requires_grad_()
    bias = torch.randn(12).double() if with_bias else None
    ours, wanted = rescale_(h * 1.0, factor, bias), rescale(h, torch.zeros_like(h), factor, bias)
    torch.testing.assert_close(ours, wanted)
    g = torch.randn_like(h)
    for a, b in zip(
        torch.autograd.grad(ours, (h, factor), g), torch.autograd.grad(wanted, (h, factor), g), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_the_output_for_one_image_is_no_view_either() -> None:
    """Else torch would forbid what it allows after a convolution of its own: to write into it behind a checkpoint."""
    model, found = CASES["conv"].model(), []
    for forward in (model, lambda x: checkpoint(model, x, use_reentrant=True)):
        x = CASES["conv"].x()[0].requires_grad_()
        forward(x * 1.0).relu_().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0])


# What siblings owe each other in second derivatives.


def of_three(rows: int, *, plain: bool) -> list[Tensor]:
    """Second derivatives of a loss that is linear in every sibling's output: none of them runs again by itself."""
    torch.manual_seed(0)
    model = Three(6, 5).double()
    inject(model, LoRAConfig(r=2, target_modules=["q", "k", "v"]))
    with torch.no_grad():
        for layer in (model.q, model.k, model.v):
            layer.lora_B.normal_()  # type: ignore[operator,union-attr]
    x = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    with plain_arithmetic() if plain else contextlib.nullcontext():
        middle = x * 1.5
        outs = [layer(middle) for layer in (model.q, model.k, model.v)]
        loss = sum((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outs)
        trained = [x, *(p for p in model.parameters() if p.requires_grad)]
        first = torch.autograd.grad(loss, trained, create_graph=True)  # type: ignore[arg-type]
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), trained))  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [3, 0])
def test_second_derivatives_reach_the_first_sibling_by_z_alone(rows: int) -> None:
    for ours, wanted in zip(of_three(rows, plain=False), of_three(rows, plain=True), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alone", [False, True])
def test_a_step_between_forward_and_the_backward_of_a_sibling_raises(alone: bool) -> None:
    """As torch does of what it saved, whether the first sibling's backward ran before or never does."""
    model = Three(6, 5)
    inject(model, LoRAConfig(r=2, target_modules=["q", "k", "v"]))
    middle = torch.randn(3, 6, requires_grad=True) * 1.5
    first, second = model.q(middle), model.k(middle)
    if not alone:
        first.sum().backward(retain_graph=True)
    with torch.no_grad():
        model.k.lora_A.mul_(2.0)  # type: ignore[operator,union-attr]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.sum().backward()


# The norms of DoRA.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_thin_norms_are_the_norms(dtype: torch.dtype, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(norms, "BLOCK", 30)
    W, A, B = torch.randn(12, 10).to(dtype), torch.randn(3, 10), torch.randn(12, 3)
    W = W.t().contiguous().t() if transposed else W
    own = updated_row_norms(W, [], torch.float32)
    exact = (W.double() + 0.7 * B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(thin_row_norms(own, W, A, B, 0.7).double(), exact, rtol=2e-6, atol=0)
    assert torch.equal(thin_row_norms(own, W, A, torch.zeros_like(B), 0.7), own)
    assert torch.equal(updated_row_norms(W, [(A, torch.zeros_like(B), 0.7)], torch.float32), own)


def test_a_row_that_cancels_is_left_to_the_dense_way() -> None:
    model = nn.Sequential(nn.Linear(10, 6, bias=False))
    inject(model, LoRAConfig(r=2, target_modules=["0"], use_dora=True))
    layer = model[0]
    with torch.no_grad():
        layer.lora_A[0] = layer.weight[3]
        layer.lora_B[3, 0] = -(1 - 1e-4) / layer.lora_settings.scale
    assert layer._thin_norms() is None
    moved = layer.weight.double() + layer.delta_weight().double()
    torch.testing.assert_close(layer.updated_norms().double(), moved.norm(dim=1), rtol=1e-3, atol=0)


def test_norms_are_those_of_the_weight_as_it_is() -> None:
    """However it was written into: torch counts no write through `.data`."""
    model = nn.Sequential(nn.Linear(10, 6))
    inject(model, LoRAConfig(r=2, target_modules=["0"], use_dora=True))
    layer = model[0]
    for change in (
        lambda: layer.weight.mul_(2.0),
        lambda: layer.weight.data.mul_(1.5),
        lambda: layer.weight.numpy().__imul__(0.7),
        lambda: setattr(layer.weight, "data", layer.weight.data * 3.0),
        lambda: layer._parameters.update(weight=nn.Parameter(layer.weight * 5.0, requires_grad=False)),
    ):
        before = layer.updated_norms()
        with torch.no_grad():
            change()
        torch.testing.assert_close(layer.updated_norms(), layer.weight.norm(dim=1))
        assert not torch.equal(layer.updated_norms(), before)


# Which way a layer goes.


class Own(nn.Linear):
    """A base with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * 2.0, self.bias)


def test_the_report_says_what_goes_the_plain_way_and_why() -> None:
    def layers() -> nn.Module:
        return nn.ModuleDict(
            {
                "one": nn.Linear(8, 8),
                "own": Own(8, 8),
                "bounded": nn.Embedding(9, 8, max_norm=1.0),
                "ids": nn.Embedding(9, 8),
                "image": nn.Conv2d(8, 8, 3),
                "attention": nn.MultiheadAttention(8, 2),
            }
        )

    report = inject(layers(), LoRAConfig(r=2, target_modules=["one", "own", "bounded", "ids", "image", "attention"]))
    said = {row.module: row.arithmetic for row in report.modules}
    assert {name for name, way in said.items() if way == "quick"} == {"one", "ids", "image"}
    assert said["own"] == "plain: Own reads its weight in its own way"
    assert said["bounded"] == "plain: max_norm bounds each row"
    assert said["attention"] == "plain: no quick form of MultiheadAttention"
    assert report.to_dict()["modules"][0]["arithmetic"] == "quick"
    assert "way" in str(report).splitlines()[0].split()
    assert report.plain_line() in str(report)
    assert report.plain_line().startswith("plain arithmetic in 3 of 6 layers: ")
    quickly = inject(layers(), LoRAConfig(r=2, target_modules=["one", "ids"]))
    assert quickly.plain_line() == ""
    assert "way" not in str(quickly).splitlines()[0].split()
    for r, way in ((8, "quick"), (9, "plain: slices of rank above 16 together")):
        parts = inject(nn.Sequential(nn.Linear(16, 30)), LoRAConfig(r=r, target_modules=["0"], slices=THIRDS))
        assert parts.modules[0].arithmetic == way
    scarce = inject(layers(), LoRAConfig(r=2, target_modules=["one"], dropout=0.001))
    assert scarce.modules[0].arithmetic == "plain: dropout 0.001 is not within 1/512 and 511/512"
