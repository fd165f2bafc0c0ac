"""`quick_linear` is the formula, in every dtype, mode and order of calls, and keeps what it says it keeps."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_lightning import LoRAConfig, inject
from lora_lightning.lora.drops import Dropout, dropped_of_256
from lora_lightning.lora.drops import kept as kept_elements
from lora_lightning.lora.layers import fused_linear as quick
from lora_lightning.lora.layers.fused_linear import Frozen, plain_arithmetic, quick_linear
from lora_lightning.lora.reading import Down
from lora_lightning.lora.switches import compute_apart

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True, params=["rows of r", "rows of n"])
def order_in_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both orders of what is of rank's size, whatever CPU this is."""
    monkeypatch.setattr(quick, "_LONG_ROWS", request.param == "rows of n")


def formula(x: Tensor, frozen: Frozen, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`x W0^T + b + s x A^T B^T`, from the paper."""
    weight = frozen.weight.t() if frozen.transposed else frozen.weight
    out = x @ weight.t() + scale * (x @ A.t()) @ B.t()
    return out if frozen.bias is None else out + frozen.bias


def operands(*, transposed: bool = False, bias: bool = True, rows: tuple[int, ...] = (4, 3)) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x, W = torch.randn(*rows, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    A, B = torch.randn(2, 6, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    for tensor in (x, A, B):
        tensor.requires_grad_()
    return (
        x,
        Frozen(W.t().contiguous() if transposed else W, torch.randn(5).double() if bias else None, transposed),
        A,
        B,
    )


class Readers(nn.Module):
    """Three layers on one input, one on another, as in attention; `order` is that of the calls."""

    def __init__(self, order: str = "qkv", width: int = 12) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, 8, bias=False), nn.Linear(width, width)
        self.o, self.order = nn.Linear(width, width), order

    def forward(self, x: Tensor) -> Tensor:
        out = {name: self.get_submodule(name)(x) for name in self.order}
        mixed = out["q"].sigmoid() * out["v"] if "v" in out else out["q"]
        if "k" in out:
            mixed = mixed * out["k"].mean(-1, keepdim=True)
        return self.o(mixed)


class Three(nn.Module):
    """Query, key and value of one input."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, out) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) + self.v(x)


def adapted(model: nn.Module, dtype: torch.dtype = torch.float64, **options: object) -> nn.Module:
    torch.manual_seed(1)
    model = model.to(dtype)
    inject(model, LoRAConfig(r=3, target_modules=".+", **options))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def everything(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, dX and the gradient of every trained parameter."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = model(x * 1.0)  # siblings share what a graph leads to
    (out.double() * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert x.grad is not None
    assert all(g is not None for g in grads)
    return [out.detach(), x.grad, *[g for g in grads if g is not None]]


def assert_alike(ours: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        largest = max([1.0, *b.double().abs().flatten().tolist()])
        assert all(d <= tolerance * largest for d in (a.double() - b.double()).abs().flatten().tolist())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(), (3,), (2, 3)])
def test_output_and_gradients_are_the_formulas(transposed: bool, bias: bool, rows: tuple[int, ...]) -> None:
    x, frozen, A, B = operands(transposed=transposed, bias=bias, rows=rows)
    ours, wanted = quick_linear(x, frozen, Down(1, A, 0.7), B), formula(x, frozen, A, B, 0.7)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(wanted)
    for a, b in zip(torch.autograd.grad(ours, (x, A, B), g), torch.autograd.grad(wanted, (x, A, B), g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck_once_and_twice_alone_and_shared(dropout: float) -> None:
    x, frozen, A, B = operands(rows=(3,))
    C = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)

    def alone(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(5)
        return quick_linear(x, frozen, Down(1, A, 0.7), B, dropout=dropout)

    def shared(x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        torch.manual_seed(5)
        x, one, two = x * 1.0, Down(1, A, 0.7), Down(2, C, 0.3)
        first = quick_linear(x, frozen, one, B, siblings=lambda: [two], dropout=dropout)
        return first * quick_linear(x, frozen, two, B, dropout=dropout)

    for call, inputs in ((alone, (x, A, B)), (shared, (x, A, B, C))):
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["qkv", "vqk", "kvq", "q", "vq"])
def test_layers_on_one_input_are_the_plain_form_in_any_order(dtype: torch.dtype, order: str) -> None:
    model = adapted(Readers(order), dtype)
    for name in "qkv":
        if name not in order:
            model.get_submodule(name).requires_grad_(False)
    x = torch.randn(2, 5, 12, dtype=dtype)
    ours = everything(model, x)
    with plain_arithmetic():
        wanted = everything(model, x)
    assert_alike(ours, wanted, TOLERANCE[dtype])


def test_the_plain_form_is_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the comparisons here would compare a thing with itself."""
    model, calls = adapted(Readers()), []
    product = quick._base
    monkeypatch.setattr(quick, "_base", lambda *args: calls.append(1) or product(*args))
    everything(model, torch.randn(2, 12).double())
    assert len(calls) == 4
    with plain_arithmetic():
        everything(model, torch.randn(2, 12).double())
    assert len(calls) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_plain_form_to_rounding(dtype: torch.dtype) -> None:
    model, x = adapted(Readers(), dtype), torch.randn(2, 5, 12, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours = everything(model, x)
        with plain_arithmetic():
            wanted = everything(model, x)
    assert ours[0].dtype == torch.bfloat16
    assert_alike(ours, wanted, TOLERANCE[torch.bfloat16])


def test_bfloat16_base_trains_float32_factors() -> None:
    model = adapted(Readers(), torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
    everything(model, torch.randn(2, 5, 12).bfloat16())
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("apart", [False, True])
def test_activation_checkpointing_gives_the_gradients_of_what_it_computed(
    reentrant: bool, dropout: float, apart: bool
) -> None:
    """The whole of it recomputed, or each layer by itself; under dropout with the masks of the first time."""
    model, x = adapted(Three(6, 4), dropout=dropout).train(), torch.randn(3, 6).double().requires_grad_()

    def called(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        x = x * 1.0
        if not apart:
            return checkpoint(lambda x: model.q(x) * model.k(x) + model.v(x * 1.0), x, use_reentrant=reentrant)
        q, k, v = (checkpoint(layer, x, use_reentrant=reentrant) for layer in (model.q, model.k, model.v))
        return q * k + v

    weights = [x, model.q.lora_A, model.k.lora_A, model.k.lora_B, model.v.lora_A]
    g = torch.randn(3, 4, dtype=torch.float64)
    model.zero_grad()
    called(x).backward(g)
    grads = [weight.grad for weight in weights]
    for weight, grad in zip(weights, grads, strict=True):
        direction, before = torch.randn_like(weight), weight.detach().clone()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.copy_(before + sign * 1e-6 * direction)
            values.append(float((called(x) * g).sum().detach()))
        with torch.no_grad():
            weight.copy_(before)
        assert abs((values[0] - values[1]) / 2e-6 - float((grad * direction).sum())) < 1e-6


def test_compile_gives_the_same_without_a_graph_break() -> None:
    model, x = adapted(Readers()), torch.randn(2, 5, 12).double()
    wanted = everything(model, x)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    assert_alike(everything(compiled, x), wanted, 1e-12)
    torch.compiler.reset()


def test_torch_func_goes_the_plain_way() -> None:
    model, x = adapted(Readers()), torch.randn(4, 3, 12).double()
    per_row = torch.func.vmap(model)(x)
    torch.testing.assert_close(per_row, model(x), rtol=1e-12, atol=1e-12)
    _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    step = 1e-6
    torch.testing.assert_close(tangent, (model(x + step) - model(x - step)) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12), (12,)])
def test_empty_batches_and_single_rows(shape: tuple[int, ...]) -> None:
    model = adapted(Readers("qv"))
    model.k.requires_grad_(False)
    x = torch.randn(shape).double()
    ours = everything(model, x)
    with plain_arithmetic():
        assert_alike(ours, everything(model, x), 1e-12)


def test_inputs_that_are_no_rows_in_memory() -> None:
    model, x = adapted(Readers("qv")), torch.randn(12, 5, 2).double()
    model.k.requires_grad_(False)
    for view in (x.permute(2, 1, 0), x.permute(1, 2, 0)[::2], x[:, :1].expand(12, 5, 2).permute(2, 1, 0)):
        inputs = view.detach().requires_grad_()
        out = model(inputs)
        (ours,) = torch.autograd.grad(out.sum(), inputs)
        with plain_arithmetic():
            (wanted,) = torch.autograd.grad(model(inputs).sum(), inputs)
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


def test_no_gradient_where_none_is_wanted() -> None:
    model, x = adapted(Readers()), torch.randn(2, 12).double()
    model.q.lora_A.requires_grad_(False)
    model(x).sum().backward()
    assert x.grad is None
    assert model.q.lora_A.grad is None
    assert model.q.lora_B.grad is not None
    with plain_arithmetic():
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        model(x).sum().backward()
    assert_alike(grads, [p.grad for p in model.parameters() if p.grad is not None], 1e-12)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inputs = x.clone().requires_grad_()
    (ours,) = torch.autograd.grad(model(inputs).sum(), inputs)
    with plain_arithmetic():
        (wanted,) = torch.autograd.grad(model(inputs).sum(), inputs)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


def test_one_layer_twice_on_one_input() -> None:
    layer = adapted(nn.Sequential(nn.Linear(12, 12)))
    twice = nn.Module()
    twice.layer = layer
    twice.forward = lambda x: layer(x) * layer(x) + layer(layer(x))  # type: ignore[method-assign]
    x = torch.randn(3, 12).double()
    ours = everything(twice, x)
    with plain_arithmetic():
        assert_alike(ours, everything(twice, x), 1e-12)


def test_an_input_changed_in_place_is_another_input() -> None:
    model, x = adapted(Readers()), torch.randn(3, 12).double()
    first = model.q(x)
    x.add_(1.0)
    second = model.v(x)
    with plain_arithmetic():
        torch.testing.assert_close(second, model.v(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(first, model.q(x - 1.0), rtol=1e-12, atol=1e-12)
    hidden = (x * 1.0).requires_grad_() * 1.0
    model.zero_grad()
    model.k(hidden)
    hidden.add_(1.0)
    (ours,) = torch.autograd.grad(model.v(hidden).square().sum(), model.v.lora_A)
    with plain_arithmetic():
        (wanted,) = torch.autograd.grad(model.v(x + 1.0).square().sum(), model.v.lora_A)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


def test_inference_mode_sees_changes_in_place_too() -> None:
    model = adapted(Readers(), torch.float32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(3, 12)
        model.q(x)
        x.add_(1.0)
        ours = model.v(x)
        with plain_arithmetic():
            torch.testing.assert_close(ours, model.v(x), rtol=4e-2, atol=4e-2)


def test_siblings_that_do_not_read_the_same_are_alone() -> None:
    """A chain of equal widths: each computes z of the others in vain, and no number is another's."""

    class Chain(Three):
        def forward(self, x: Tensor) -> Tensor:
            return self.v(self.k(self.q(x)))

    model, x = adapted(Chain(12, 12)), torch.randn(3, 12).double()
    ours = everything(model, x)
    with plain_arithmetic():
        assert_alike(ours, everything(model, x), 1e-12)


def test_a_sibling_changed_between_the_calls_counts_as_it_is() -> None:
    model, x = adapted(Three(12, 12)), torch.randn(3, 12).double()
    model.q(x)
    with torch.no_grad():
        model.v.lora_A.mul_(2.0)
    ours = model.v(x)
    with plain_arithmetic():
        torch.testing.assert_close(ours, model.v(x), rtol=1e-12, atol=1e-12)


def test_checkpointing_of_one_sibling_alone() -> None:
    """k recomputes without q: it must not have leaned on it."""

    class Partly(Three):
        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + checkpoint(self.k, x, use_reentrant=False) + checkpoint(self.v, x, use_reentrant=True)

    model, x = adapted(Partly(12, 12), dropout=0.3).train(), torch.randn(3, 12).double()
    everything(model, x)
    torch.manual_seed(3)
    first = everything(model, x)
    torch.manual_seed(3)
    assert_alike(everything(model, x), first, 0.0)


def test_copies_and_pickles_compute_alike() -> None:
    import io

    model, x = adapted(Three(12, 12)), torch.randn(3, 12).double()
    wanted = everything(model, x)
    twin = copy.deepcopy(model)
    assert_alike(everything(twin, x), wanted, 0.0)
    assert twin.q.lora_siblings.layers == (twin.q, twin.k, twin.v)
    alone = copy.deepcopy(model.q)
    assert alone.lora_siblings.layers == ()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_alike(everything(torch.load(file, weights_only=False), x), wanted, 0.0)


def test_losses_that_go_backward_one_after_the_other() -> None:
    """Plain layers on a leaf allow it without retain_graph; the joined ones must too."""
    model = adapted(Readers())
    x = torch.randn(3, 12).double().requires_grad_()
    q, v = model.q(x), model.v(x)
    q.sum().backward()
    v.square().sum().backward()
    ours = [x.grad, model.q.lora_A.grad, model.v.lora_A.grad, model.v.lora_B.grad]
    again = x.detach().clone().requires_grad_()
    model.zero_grad()
    with plain_arithmetic():
        (model.q(again).sum() + model.v(again).square().sum()).backward()
    wanted = [again.grad, model.q.lora_A.grad, model.v.lora_A.grad, model.v.lora_B.grad]
    assert_alike([t for t in ours if t is not None], [t for t in wanted if t is not None], 1e-12)
    assert all(t is not None for t in ours)


def test_a_later_layer_alone_carries_the_gradient() -> None:
    """The first layer's output is not used: its node finishes dX all the same, and its factors get no gradient."""
    model = adapted(Readers())
    x = torch.randn(3, 12).double().requires_grad_()
    model.q(x)
    out = model.v(x)
    out.sum().backward()
    assert model.q.lora_A.grad is None
    assert x.grad is not None
    with plain_arithmetic():
        (wanted,) = torch.autograd.grad(model.v(x).sum(), x)
    torch.testing.assert_close(x.grad, wanted, rtol=1e-12, atol=1e-12)


def test_backward_for_some_inputs_leaves_nothing_behind() -> None:
    model = adapted(Readers())
    x = torch.randn(3, 12).double().requires_grad_()
    out = model(x).sum()
    torch.autograd.grad(out, [model.v.lora_B], retain_graph=True)
    (first,) = torch.autograd.grad(out, [x], retain_graph=True)
    (second,) = torch.autograd.grad(out, [x])
    with plain_arithmetic():
        (wanted,) = torch.autograd.grad(model(x).sum(), [x])
    torch.testing.assert_close(first, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second, wanted, rtol=1e-12, atol=1e-12)


def test_accumulated_steps_add_up() -> None:
    model, x = adapted(Readers()), torch.randn(2, 3, 12).double()
    model.zero_grad()
    for part in x:
        model(part).sum().backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with plain_arithmetic():
        model(x).sum().backward()
    assert_alike(ours, [p.grad for p in model.parameters() if p.grad is not None], 1e-12)


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that backward keeps beyond the parameters and the input, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    sizes: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    assert out is not None
    assert held
    return sum(sizes.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_the_input_once_and_rank_sized_numbers(dropout: float, dtype: torch.dtype) -> None:
    model = adapted(Three(64, 64), dtype, dropout=dropout).train()
    x = torch.randn(50, 64, dtype=dtype, requires_grad=True) * 1.0
    n, r, count = 50, 3, 3
    assert kept(model, x) == n * r * count * x.element_size()


def test_autocast_keeps_one_cast_of_the_input() -> None:
    model = adapted(Three(64, 64), torch.float32)
    x = torch.randn(50, 64, requires_grad=True) * 1.0
    with torch.autocast("cpu", torch.bfloat16):
        found = kept(model, x)
    assert found == 2 * (50 * 64 + 3 * 64 * 64 + 3 * 50 * 3)  # x, the three casts of W0 as without an adapter, the z's


def test_the_graph_is_let_go() -> None:
    model = adapted(Readers())
    x = torch.randn(3, 12).double().requires_grad_()
    middle = x * 2
    seen = weakref.ref(middle)
    model(middle).sum().backward()
    del middle
    gc.collect()
    assert seen() is None
    middle = x * 2
    seen = weakref.ref(middle)
    out = model(middle)  # never gone backward
    del middle, out
    with torch.no_grad():
        model(x)
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("shape", [(4, 12), (2, 3, 12)])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_may_be_written_into(shape: tuple[int, ...], bias: bool) -> None:
    """ReLU in place, `out[..., :2] += 1`: as on a plain layer."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(12, 12, bias=bias), nn.Linear(12, 12, bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.q(x).relu_(), self.k(x)
            k[..., :2] += 1
            k.view(-1)[:3].mul_(2)
            return q + k

    model, x = adapted(InPlace()), torch.randn(shape).double()
    ours = everything(model, x)
    with plain_arithmetic():
        assert_alike(ours, everything(model, x), 1e-12)


def test_an_optimizer_that_steps_within_backward_changes_no_gradient() -> None:
    def run(plainly: bool) -> Tensor:
        torch.manual_seed(0)
        model = adapted(Three(12, 12))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: (p.data.add_(p.grad, alpha=-0.1), None)[1])
        x = torch.linspace(-1, 1, 36, dtype=torch.float64).view(3, 12).requires_grad_()
        h = x * 1.0
        with plain_arithmetic() if plainly else contextlib.nullcontext():
            (model.q(h) + model.k(h) * model.v(h)).sum().backward()
        assert x.grad is not None
        return x.grad

    torch.testing.assert_close(run(plainly=False), run(plainly=True), rtol=1e-12, atol=1e-12)


def test_a_backward_pass_within_another_takes_nothing_from_it() -> None:
    def run(plainly: bool) -> Tensor:
        torch.manual_seed(0)
        model = adapted(Three(12, 12))
        x = torch.linspace(-1, 1, 36, dtype=torch.float64).view(3, 12).requires_grad_()
        h = x * 1.0
        with plain_arithmetic() if plainly else contextlib.nullcontext():
            q, k, v = model.q(h), model.k(h), model.v(h)
            side = q.sum()
            k.register_hook(lambda g: (torch.autograd.grad(side, x, retain_graph=True), None)[1])
            (q * k * v).sum().backward()
        assert x.grad is not None
        return x.grad

    torch.testing.assert_close(run(plainly=False), run(plainly=True), rtol=1e-12, atol=1e-12)


def test_passes_beside_each_other_on_one_graph() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model, x = adapted(Three(12, 12)), torch.randn(3, 12).double().requires_grad_()
    h = x * 1.0
    out = (model.q(h) * model.k(h) * model.v(h)).sum()
    (wanted,) = torch.autograd.grad(out, x, retain_graph=True)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: torch.autograd.grad(out, x, retain_graph=True)[0], range(100)):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_buffer_that_is_filled_anew_is_read_anew() -> None:
    """What torch does not count as a change."""
    model, x = adapted(Three(12, 12), torch.float32), torch.randn(3, 12)
    for context in (contextlib.nullcontext(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            model.q(x)
            x.data.mul_(3.0)
            ours = model.k(x)
            with plain_arithmetic():
                torch.testing.assert_close(ours, model.k(x), rtol=4e-2, atol=4e-2)


def test_selective_checkpointing_meta_and_nested_go_the_plain_way() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    model, x = adapted(Three(12, 12)), torch.randn(2, 3, 12).double()
    wanted = everything(model, x)
    forward = model.forward
    contexts = lambda: create_selective_checkpoint_contexts(  # noqa: E731
        lambda ctx, op, *args, **kwargs: (
            CheckpointPolicy.MUST_SAVE
            if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            else CheckpointPolicy.PREFER_RECOMPUTE
        )
    )
    model.forward = lambda x: checkpoint(forward, x, use_reentrant=False, context_fn=contexts)  # type: ignore[method-assign]
    assert_alike(everything(model, x), wanted, 1e-12)
    model.forward = forward  # type: ignore[method-assign]
    assert copy.deepcopy(model).to("meta")(torch.empty(3, 12, dtype=torch.float64, device="meta")).shape == (3, 12)


def test_what_was_computed_for_nothing_is_let_go_with_the_output() -> None:
    model, x = adapted(Three(12, 12)), torch.randn(3, 12).double().requires_grad_()
    middle = x * 2
    seen = weakref.ref(middle)
    out = model(middle)
    del middle, out
    gc.collect()
    assert seen() is None


def test_wrappers_that_hang_tensors_where_parameters_were() -> None:
    """FSDP1 does so in forward, and DataParallel in its replicas."""
    model, x = adapted(Three(12, 12)), torch.randn(3, 12).double()
    wanted = model(x)
    replica = copy.deepcopy(model)
    for layer in replica.children():
        for name, value in list(layer._parameters.items()):
            if value is not None:
                del layer._parameters[name]
                layer.__dict__[name] = value.detach().clone().requires_grad_(name.startswith("lora_"))
    torch.testing.assert_close(replica(x), wanted, rtol=1e-12, atol=1e-12)
    one = copy.deepcopy(model)
    one.k._parameters.pop("lora_A")
    assert [down.layer for down in one.q._ready_siblings(0.0)] == [id(one.v)]


def test_layers_that_compute_apart_ask_for_no_siblings_factor() -> None:
    """DeepSpeed's stage 3 lets a module's parameters go as its own backward ends."""
    model, x = adapted(Three(12, 12)), torch.randn(3, 12).double().requires_grad_()
    wanted = everything(model, x)
    compute_apart(model)
    for name in "qkv":
        layer = model.get_submodule(name)
        assert layer._ready_siblings(0.0) == []
    assert_alike(everything(model, x), wanted, 1e-12)


def test_dtypes_that_torch_does_not_multiply_are_not_multiplied() -> None:
    model = adapted(Three(12, 12), torch.bfloat16)
    with pytest.raises(RuntimeError, match="same dtype"):
        model(torch.randn(3, 12))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_drops_what_it_says_and_keeps_the_expectation(p: float) -> None:
    torch.manual_seed(0)
    dropped = dropped_of_256(p)
    x, rates, sums = torch.ones(400, 500), [], []
    for seed in range(4):
        drop = Dropout(dropped, seed)
        out = kept_elements(x, drop.keep(x))
        assert torch.equal(out, kept_elements(x, drop.keep(x)))  # the same mask in backward
        rates.append(float((out == 0).double().mean()))
        sums.append(float(out.double().mean()) * drop.scale)
    exact = dropped / 256
    bound = 5 * (exact * (1 - exact) / (4 * x.numel())) ** 0.5
    assert abs(exact - p) <= 1 / 512
    assert abs(sum(rates) / 4 - exact) < bound
    assert abs(sum(sums) / 4 - 1) < bound / (1 - exact)
    assert not torch.equal(Dropout(dropped, 1).keep(x), Dropout(dropped, 2).keep(x))


def test_dropout_is_the_formula_with_its_mask() -> None:
    x, frozen, A, B = operands(rows=(40,))
    torch.manual_seed(7)
    out = quick_linear(x, frozen, Down(1, A, 0.7), B, dropout=0.25)
    grads = torch.autograd.grad(out.square().sum(), (x, A, B))
    torch.manual_seed(7)
    drop = Dropout(64, int(torch.randint(2**62, (), dtype=torch.int64)))
    mask = drop.keep(x).double() / 0.75
    wanted = formula(x, frozen, A, B, 0.0) + 0.7 * ((x * mask) @ A.t()) @ B.t()
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    for a, b in zip(grads, torch.autograd.grad(wanted.square().sum(), (x, A, B)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_layers_on_one_input_share_one_mask_and_others_do_not() -> None:
    model = adapted(Three(256, 4), dropout=0.5).train()
    for name in "qkv":
        layer = model.get_submodule(name)
        layer.lora_A.data = torch.eye(3, 256, dtype=torch.float64)
        layer.lora_B.data = torch.eye(4, 3, dtype=torch.float64)
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    x = torch.ones(64, 256, dtype=torch.float64, requires_grad=True) * 1.0
    assert torch.equal(model.q(x), model.k(x))
    assert not torch.equal(model.q(x), model.k(x * 1.0))


def test_the_seed_decides_the_mask() -> None:
    model, x = adapted(Readers(), dropout=0.3).train(), torch.randn(2, 5, 12).double()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(everything(model, x))
    assert_alike(results[0], results[1], 0.0)
    assert not torch.equal(results[0][0], results[2][0])
    model.eval()
    assert torch.equal(everything(model, x)[0], everything(model, x)[0])


@pytest.mark.parametrize("threads", [4])
def test_threads_do_not_mix(threads: int) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = adapted(Readers())
    inputs = [torch.randn(3, 12).double().requires_grad_() for _ in range(16)]

    def grad(x: Tensor) -> Tensor:
        return torch.autograd.grad(model(x).sum(), x)[0]

    wanted = [grad(x) for x in inputs]
    with ThreadPoolExecutor(threads) as pool:
        for a, b in zip(pool.map(grad, inputs), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_on_a_cpu_few_rows_take_torchs_own_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of our own gain by the row; what else the quick form does, it does for few rows too."""
    monkeypatch.setattr(quick, "FEW_ROWS", 128)

    def goes_quick(rows: int, device: str = "cpu", **options: float) -> bool:
        layer = nn.Sequential(nn.Linear(6, 5, device=device))
        inject(layer, LoRAConfig(r=2, **options), start=False)
        return layer[0]._goes_quick(torch.empty(rows, 6, device=device))

    assert not goes_quick(127)
    assert goes_quick(128)
    assert goes_quick(1, dropout=0.1)
    assert goes_quick(1, use_dora=True)
