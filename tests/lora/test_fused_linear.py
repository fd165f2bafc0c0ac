"""`fused_linear` is the formula, in every dtype, mode and order of calls, and keeps what it says it keeps."""

import contextlib
import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lora_lightning
from lora_lightning import LoRAConfig, LoRAError, LoRAModule, inject
from lora_lightning.lora.layers import fused_linear as fused
from lora_lightning.lora.layers.fused_linear import eager_arithmetic, fused_linear

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)
MANY = 60
"""Rows that fold W0 of 5 by 6."""


def formula(x, W, b, A, B, scale):
    """`x W0^T + b + s x A^T B^T`, from the paper."""
    out = x @ W.t() + scale * (x @ A.t()) @ B.t()
    return out if b is None else out + b


def operands(rows=(4, 3), *, bias=True, m=5, k=6):
    """x, W0, b, A and B, in float64; all but W0 train."""
    shapes = [(*rows, k), (m, k), (m,) if bias else None, (2, k), (m, 2)]
    made = [None if shape is None else torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return [t if t is None or i == 1 else t.requires_grad_() for i, t in enumerate(made)]


def mask_of(x, dropped, seed):
    return torch.cat([mask.clone() for _, mask in fused._blocks(x.flatten(0, -2), dropped, seed)]).view(x.shape)


def next_seed():
    return int(torch.randint(2**62, (), dtype=torch.int64))


class Readers(nn.Module):
    """Three layers on one input, one on another, as in attention."""

    def __init__(self, width=12):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, 8, bias=False), nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x):
        return self.o(self.q(x).sigmoid() * self.v(x) * self.k(x).mean(-1, keepdim=True))


def adapted(model, dtype=torch.float64, **options):
    torch.manual_seed(1)
    model = model.to(dtype)
    inject(model, LoRAConfig(r=3, target_modules=".+", **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def everything(model, x, view=lambda x: x):
    """The output, dX and the gradient of every trained parameter."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = model(view(x * 1.0))
    (out.double() * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)).sum().backward()
    return [out.detach(), x.grad, *[p.grad for p in model.parameters() if p.requires_grad]]


def assert_alike(ours, wanted, tolerance):
    for a, b in zip(ours, wanted, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        largest = max([1.0, *b.double().abs().flatten().tolist()])
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * largest)


def compare(model, x, tolerance, *view):
    """The fused form beside the eager one."""
    ours = everything(model, x, *view)
    with eager_arithmetic():
        assert_alike(ours, everything(model, x, *view), tolerance)


# The function itself, against arithmetic of its own.


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(), (3,), (2, 3), (0,), (MANY,), (2, MANY)])
def test_output_and_gradients_are_the_formulas(transposed, bias, rows):
    x, W, b, A, B = operands(rows, bias=bias)
    ours = fused_linear(x, W.t().contiguous().t() if transposed else W, b, A, B, 0.7)
    wanted = formula(x, W, b, A, B, 0.7)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    g, trained = torch.randn_like(wanted), [t for t in (x, b, A, B) if t is not None]
    for a, c in zip(torch.autograd.grad(ours, trained, g), torch.autograd.grad(wanted, trained, g), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [3, MANY])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck_once_and_twice(rows, dropout, transposed, monkeypatch):
    monkeypatch.setattr(fused, "BLOCK", 2**6)  # so that many rows draw their mask in several blocks
    x, W, b, A, B = operands((rows,), m=3, k=4)
    weight = W.t().contiguous().t() if transposed else W

    def call(x, b, A, B):
        torch.manual_seed(5)
        return fused_linear(x, weight, b, A, B, 0.7, dropout=dropout)

    assert torch.autograd.gradcheck(call, (x, b, A, B), fast_mode=rows == MANY)
    assert torch.autograd.gradgradcheck(call, (x, b, A, B), fast_mode=rows == MANY)


def test_many_rows_fold_and_others_do_not():
    """Under autocast and in bfloat16 nothing is: the sum would be rounded."""
    _, W, _, A, B = operands()

    def folds(rows, dtype, own):
        return fused._pays_to_fold(torch.randn(rows, 6, dtype=own), *(t.to(dtype) for t in (W, A, B)))

    f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
    cases = [(MANY, f64, f64), (3, f64, f64), (MANY, bf16, bf16), (MANY, f64, f32)]
    assert [folds(*case) for case in cases] == [True, False, False, False]
    with torch.autocast("cpu", torch.bfloat16):
        assert not folds(MANY, torch.float32, torch.float32)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_drops_what_it_says_and_keeps_the_expectation(p):
    x, dropped = torch.ones(400, 500), round(256 * p)
    masks = [mask_of(x, dropped, seed) for seed in range(4)]
    exact = dropped / 256
    bound = 5 * (exact * (1 - exact) / (4 * x.numel())) ** 0.5
    assert abs(exact - p) <= 1 / 512
    assert abs(float(torch.stack(masks).double().mean()) - (1 - exact)) < bound
    assert torch.equal(mask_of(x, dropped, 1), masks[1])  # the same mask in backward
    assert not torch.equal(masks[1], masks[2])


@dtypes
@pytest.mark.parametrize(("m", "k"), [(1536, 384), (384, 1536), (768, 768), (192, 576), (37, 100)])
@pytest.mark.parametrize("rows", [(1, 16), (4, 64), (2000,), (64, 4, "transposed")])
def test_a_fresh_adapter_changes_no_bit(rows, m, k, dtype):
    """Law 1: with B = 0 the output and dX are the backbone's, whose product goes by the memory order of x."""
    model, x = nn.Sequential(nn.Linear(k, m)).to(dtype).requires_grad_(False), torch.randn(*rows[:2], k).to(dtype)
    x = (x.transpose(0, 1) if rows[2:] else x).requires_grad_()
    wanted = model(x)
    g = torch.randn_like(wanted)
    (dx,) = torch.autograd.grad(wanted, x, g)
    inject(model, LoRAConfig(r=8, target_modules=["0"]))
    out = model(x)
    assert torch.equal(out, wanted)
    assert torch.equal(torch.autograd.grad(out, x, g)[0], dx)


# Layers, against their eager form.


OPTIONS = {
    "plain": {},
    "dora": {"use_dora": True},
    "dora and biases": {"use_dora": True, "bias": "all"},
    "biases": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True, "exclude_modules": ["k"]},
    "slices": {"slices": {"[qv]": {"of": ["a", "b", "c"], "take": ["a", "c"], "heads": 2}}},
    "start": {"init": "pissa"},
    "start and dora": {"init": "olora", "use_dora": True},
}


@dtypes
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("rows", [(2, 5), (9, 9)])
def test_a_layer_is_its_eager_form(name, dtype, rows):
    compare(adapted(Readers(), dtype, **OPTIONS[name]), torch.randn(*rows, 12, dtype=dtype), 4 * TOLERANCE[dtype])


@dtypes
@pytest.mark.parametrize("rows", [(2, 5), (9, 9)])
def test_under_autocast_the_eager_form_to_rounding(dtype, rows):
    model, x = adapted(Readers(), dtype), torch.randn(*rows, 12, dtype=dtype)
    low = dtype if dtype == torch.float64 else torch.bfloat16  # float64 stays so
    whole = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        for own in {dtype, low}:  # as it comes, and as another layer has left it
            assert fused.can_fuse(x.to(own), model.q.weight)
            compare(model, x.to(own), TOLERANCE[low])
        assert_alike([everything(model, x)[0]], [whole.to(low)], TOLERANCE[low])


BATCHES = {
    "empty": ((0, 12), lambda x: x),
    "empty in the middle": ((2, 0, 12), lambda x: x),
    "a single row": ((12,), lambda x: x),
    "turned": ((12, 5, 2), lambda x: x.permute(2, 1, 0)),
    "every second row": ((12, 5, 2), lambda x: x.permute(1, 2, 0)[::2]),
    "expanded": ((12, 5, 2), lambda x: x[:, :1].expand(12, 5, 2).permute(2, 1, 0)),
}


@pytest.mark.parametrize(("shape", "view"), BATCHES.values(), ids=BATCHES)
def test_empty_batches_and_inputs_that_are_no_rows_in_memory(shape, view):
    compare(adapted(Readers()), torch.randn(shape).double(), 1e-12, view)


@pytest.mark.parametrize("rows", [2, 100])
def test_no_gradient_where_none_is_wanted(rows):
    model, x = adapted(Readers()), torch.randn(rows, 12).double()
    model.q.lora_A.requires_grad_(False)
    model.k.lora_B.requires_grad_(False)
    model(x).sum().backward()
    assert x.grad is model.q.lora_A.grad is model.k.lora_B.grad is None
    compare(model, x, 1e-11)
    compare(model.requires_grad_(False), x, 1e-11)


@pytest.mark.parametrize("rows", [(4, 12), (2, 3, 12), (9, 9, 12)])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_may_be_written_into(rows, bias):
    """ReLU in place, `out[..., :2] += 1`: as on a plain layer."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(12, 12, bias=bias), nn.Linear(12, 12, bias=bias)

        def forward(self, x):
            q, k = self.q(x).relu_(), self.k(x)
            k[..., :2] += 1
            k.view(-1)[:3].mul_(2)
            return q + k

    compare(adapted(InPlace()), torch.randn(rows).double(), 1e-12)


def test_a_step_between_forward_and_backward_raises():
    """As torch does of what it saved."""
    model = adapted(Readers())
    out = model(torch.randn(3, 12).double())
    with torch.no_grad():
        model.k.lora_A.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# What is around: checkpointing, compilation, transforms, copies, threads.


def offloaded(forward, x):
    with torch.autograd.graph.save_on_cpu():
        return forward(x)


AGAIN = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "offloaded": offloaded,
}


@pytest.mark.parametrize("again", AGAIN)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_activation_checkpointing_and_offloading_give_the_same(again, dropout):
    """Under dropout too, whose mask is drawn again from the seed: bit for bit."""
    model, x = adapted(Readers(), dropout=dropout).train(), torch.randn(2, 5, 12).double()
    forward, results = model.forward, []
    for seed, run in ((3, forward), (3, lambda x: AGAIN[again](forward, x)), (4, forward)):
        model.forward = run
        torch.manual_seed(seed)
        results.append(everything(model, x))
    assert_alike(results[1], results[0], 0.0)
    assert torch.equal(results[2][0], results[0][0]) == (dropout == 0)


def keep_products(ctx, op, *args, **kwargs):
    keep = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def test_selective_checkpointing_the_meta_device_and_torch_func_take_the_eager_form():
    model, x = adapted(Readers()), torch.randn(2, 3, 12).double()
    wanted, forward, selected = everything(model, x), model.forward, copy.copy(model)
    selected.forward = lambda x: checkpoint(
        forward, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(keep_products)
    )
    assert_alike(everything(selected, x), wanted, 1e-12)
    assert copy.deepcopy(model).to("meta")(torch.empty(3, 12, dtype=torch.float64, device="meta")).shape == (3, 12)
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x), rtol=1e-12, atol=1e-12)
    _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    step = 1e-6
    torch.testing.assert_close(tangent, (model(x + step) - model(x - step)) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "dora and biases", "lora_bias", "slices", "start and dora"])
def test_compile_gives_the_same_without_a_graph_break(name):
    model, x = adapted(Readers(), **OPTIONS[name]), torch.randn(2, 5, 12).double()
    wanted = everything(model, x)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    assert_alike(everything(compiled, x), wanted, 1e-11)
    torch.compiler.reset()


def test_wrappers_that_hang_tensors_where_parameters_were():
    """DataParallel does so in its replicas."""
    model, x = adapted(Readers()), torch.randn(3, 12).double()
    wanted = model(x)
    for layer in model.children():
        for name, value in list(layer._parameters.items()):
            if value is not None:
                del layer._parameters[name]
                layer.__dict__[name] = value.detach().clone().requires_grad_(name.startswith("lora_"))
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)


def test_passes_beside_each_other_on_one_graph_and_threads_do_not_mix():
    model, x = adapted(Readers(), dropout=0.3).train(), torch.randn(3, 12).double().requires_grad_()
    out = model(x).sum()
    (wanted,) = torch.autograd.grad(out, x, retain_graph=True)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: torch.autograd.grad(out, x, retain_graph=True)[0], range(50)):
            assert torch.equal(found, wanted)


def test_an_optimizer_that_steps_within_backward_changes_no_gradient():
    def gradient(arithmetic):
        model, x = adapted(Readers()), torch.linspace(-1, 1, 36, dtype=torch.float64).view(3, 12).requires_grad_()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: (p.data.add_(p.grad, alpha=-0.1), None)[1])
        with arithmetic:
            model(x).sum().backward()
        return x.grad

    torch.manual_seed(0)
    ours = gradient(contextlib.nullcontext())
    torch.manual_seed(0)
    torch.testing.assert_close(ours, gradient(eager_arithmetic()), rtol=1e-12, atol=1e-12)


def test_a_probability_that_no_byte_can_decide_takes_torchs_dropout():
    model = adapted(nn.Sequential(nn.Linear(100, 4)), dropout=0.001).train()
    x = torch.randn(500, 100).double()
    assert not torch.equal(model(x), model.eval()(x))


# What backward keeps, and for how long.


def kept(model, x):
    """Bytes that backward keeps beyond the parameters and the input, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
        model(x)
    assert held
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(size for place, size in sizes.items() if place not in own)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"lora_bias": True}], ids=str)
def test_backward_keeps_rank_sized_numbers_alone(dropout, dtype, options):
    """The input is there anyway; under autocast it is kept once, in bfloat16."""
    x, model = torch.randn(50, 64, dtype=dtype, requires_grad=True) * 1.0, nn.Sequential(nn.Linear(64, 64))
    model = adapted(model, dtype, dropout=dropout, **options).train()
    assert kept(model, x) == 50 * 3 * x.element_size()
    if dtype == torch.float32 and not options and not dropout:
        with torch.autocast("cpu", torch.bfloat16):
            assert kept(model, x) == 2 * 50 * 3


@pytest.mark.parametrize("backward", [True, False])
def test_the_graph_is_let_go(backward):
    middle = torch.randn(3, 12).double().requires_grad_() * 2
    seen, out = weakref.ref(middle), adapted(Readers())(middle)
    if backward:
        out.sum().backward()
    del middle, out
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize(
    ("name", "instead"), [("prepare_weights", "leave it out"), ("recompute_inputs", "activation_")]
)
def test_options_that_are_gone_say_what_to_take(name, instead):
    with pytest.raises(ImportError, match=f"{name} is gone: .*{instead}"):
        getattr(lora_lightning, name)
    with pytest.raises(LoRAError, match=f"{name} .*{instead}"):
        LoRAModule(nn.Linear(2, 2), None, **{name: True})
    with pytest.raises(TypeError, match="unexpected keyword argument 'lorra'"):
        LoRAModule(nn.Linear(2, 2), None, lorra=1)
