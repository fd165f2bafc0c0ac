"""Laws 1, 6 and 7 over drawn shapes, ranks, scales and dtypes of every kind."""

import copy
import tempfile

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lightning import LoRAConfig, inject, load_adapter, merge, save_adapter
from lora_lightning.lora.frozen.tensors import adapter_tensors
from tests.lora.kinds import bare
from tests.lora.laws import DTYPES, TOLERANCE, relative, stir

sizes = st.integers(1, 6)


class Stack(nn.Module):
    """A product with a bare matrix, or with each matrix of a stack."""

    def __init__(self, shape, transposed):
        super().__init__()
        self.is_transposed = transposed
        self.w = nn.Parameter(torch.randn(*shape))

    def forward(self, x):
        w = self.w.mT if self.is_transposed and self.w.dim() == 3 else self.w
        return x @ w.mT


class Self(nn.Module):
    def __init__(self, width, heads, **kwargs):
        super().__init__()
        self.w = nn.MultiheadAttention(width * heads, heads, **kwargs)

    def forward(self, x):
        return self.w(x, x, x)[0]


def linear(draw):
    n, m = draw(sizes), draw(sizes)
    return nn.ModuleDict({"w": nn.Linear(n, m, bias=draw(st.booleans()))}), torch.randn(3, n), min(n, m), {}


def fused(draw):
    n, heads = draw(sizes), draw(st.integers(1, 3))
    parts = draw(st.lists(sizes, min_size=2, max_size=4))
    names = list("abcd"[: len(parts)])
    take = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    rows = [heads * size for name, size in zip(names, parts, strict=True) if name in take]
    spec = {"of": names, "sizes": parts, "heads": heads, "take": take}
    module = draw(st.sampled_from([nn.Linear, lambda i, o: Conv1D(o, i)]))(n, heads * sum(parts))
    return nn.ModuleDict({"w": module}), torch.randn(3, n), min(n, *rows), {"slices": {"w": spec}}


def embedding(draw):
    n, m = draw(st.integers(2, 9)), draw(sizes)
    max_norm = draw(st.sampled_from([None, 1e3]))
    module = nn.Embedding(n, m, padding_idx=draw(st.sampled_from([None, 0, -1])), max_norm=max_norm)
    return nn.ModuleDict({"w": module}), torch.randint(n, (3, 2)), min(n, m), {}


def stack(draw):
    matrices, transposed = draw(st.sampled_from([(), (1,), (2,), (4,)])), draw(st.booleans())
    shape = (*matrices, draw(sizes), draw(sizes))
    inputs = shape[-2] if matrices and transposed else shape[-1]
    return Stack(shape, transposed), torch.randn(*matrices, 3, inputs), min(shape[-2:]), bare("w")


def attention(draw):
    width, heads = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    flags = {name: draw(st.booleans()) for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    parts = draw(st.sampled_from([{}, {"slices": {"w": draw(st.sampled_from([["q"], ["q", "v"], ["k", "v"]]))}}]))
    targets = {"target_modules": draw(st.sampled_from([["w"], ["w", "out_proj"]]))}
    return Self(width, heads, **flags), torch.randn(3, 2, width * heads), width * heads, {**parts, **targets}


def conv(draw):
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3]))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    padding, stride = ("same", 1) if draw(st.booleans()) else (each(0, 2), each(1, 3))
    n, m = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    # torch 2.13 computes a Conv3d with strides and dilations wrongly in bfloat16 on a CPU.
    dilation = 1 if dims == 3 and stride != 1 else each(1, 2)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": mode}
    of_dims = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    module = of_dims(n, m, each(1, 3), bias=draw(st.booleans()), **options)
    return nn.ModuleDict({"w": module}), torch.randn(2, n, *[5] * dims), groups, {"r": groups}


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_every_kind_over_drawn_shapes(data):
    torch.manual_seed(data.draw(st.integers(0, 9)))
    kind = data.draw(st.sampled_from([linear, fused, embedding, stack, attention, conv]))
    model, x, largest, fields = kind(data.draw)
    dtype = data.draw(st.sampled_from(DTYPES))
    model = model.to(dtype).eval().requires_grad_(False)
    x = x.to(dtype) if x.is_floating_point() else x
    chosen = {"target_modules": ["w"], "alpha": data.draw(st.sampled_from([0.5, 3.0])), **fields}
    config = LoRAConfig(**{"r": data.draw(st.integers(1, largest)), "use_rslora": data.draw(st.booleans()), **chosen})

    def run(m):
        return m["w"](x) if isinstance(m, nn.ModuleDict) else m(x)

    with torch.no_grad():
        plain = copy.deepcopy(model)
        inject(model, config)
        assert torch.equal(run(model), run(plain))
        adapted = run(stir(model))
        again = copy.deepcopy(plain)
        with tempfile.TemporaryDirectory() as directory:
            load_adapter(again, save_adapter(model, directory))
        mine, back = adapter_tensors(model), adapter_tensors(again)
        assert mine.keys() == back.keys()
        assert all(torch.equal(mine[key], back[key]) for key in mine)
        merge(model)
        assert relative(run(model), adapted) <= (0.2 if dtype == torch.bfloat16 else 10 * TOLERANCE[dtype])
