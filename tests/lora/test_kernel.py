"""Law 1 where torch computes attention by fused kernels, in eval without gradients, over masks.

To the bit where the kernel reads adapted weights; to rounding where it is held off for a layer that must be called.
"""

import copy

import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, disabled, inject, merge, remove
from tests.lora.laws import DTYPES, TOLERANCE, relative, stir

WIDTH, HEADS, LENGTH = 16, 2, 7
PAD = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [4], [1]])
CAUSAL = torch.ones(LENGTH, LENGTH).triu(1).bool()


def filled(model, dtype):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return model.to(dtype).eval().requires_grad_(False)


def tokens(dtype):
    return torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def attention():
    return filled(nn.ModuleDict({"attn": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)}), torch.float32)


@torch.no_grad()
def call(model, x, options):
    return [out for out in model["attn"](x, x, x, **options) if out is not None]


@pytest.mark.parametrize("options", [{"need_weights": False, "key_padding_mask": PAD}, {}], ids=["padded", "weights"])
def test_a_fresh_adapter_leaves_attentions_kernel_every_bit(options, monkeypatch):
    """Over every mask and dtype among the kinds of `test_laws.py`; here the kernel is seen to run."""
    plain, x, calls, kernel = attention(), tokens(torch.float32), [], torch._native_multi_head_attention
    monkeypatch.setattr(torch, "_native_multi_head_attention", lambda *args: calls.append(1) or kernel(*args))
    model = copy.deepcopy(plain)
    inject(model, LoRAConfig(r=2, target_modules=["attn", "out_proj"]))
    want, got = call(plain, x, options), call(model, x, options)
    assert len(calls) == 2, "which reads the adapted weights"
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert relative(call(stir(model), x, options)[0], want[0]) > 1e-2
    assert len(calls) == 3


ENCODERS = {
    "post, relu": {},
    "pre, gelu": {"norm_first": True, "activation": "gelu"},
    "post, silu": {"activation": nn.functional.silu},  # the encoder has no kernel for it, attention has
    "odd heads": {"nhead": 1},
}
INSIDE = [["linear2"], ["self_attn"], ["layers.0.self_attn.out_proj", "layers.1.linear1"], "all-linear"]
ENCODER_MASKS = {
    "none": {},
    "padding at the end": {"src_key_padding_mask": PAD},
    "padding anywhere": {"src_key_padding_mask": PAD.flip(1)},
    "causal": {"mask": CAUSAL},
    "causal in floats": {"mask": torch.zeros(LENGTH, LENGTH).masked_fill(CAUSAL, float("-inf"))},
    "causal and padding": {"mask": CAUSAL, "src_key_padding_mask": PAD},
}


def encoder(case, dtype, nested):
    options = {"nhead": HEADS, "dim_feedforward": 24, "batch_first": True, **ENCODERS[case]}
    layer = nn.TransformerEncoderLayer(WIDTH, **options)
    return filled(nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=nested), dtype)


@torch.no_grad()
def encoded(model, x, mask):
    return model(x, **{name: m.to(x.dtype) if m.is_floating_point() else m for name, m in ENCODER_MASKS[mask].items()})


# Each layer with each mask, with each dtype, and each mask with each dtype.
PAIRS = [(case, mask, DTYPES[(i + j) % 3]) for i, case in enumerate(ENCODERS) for j, mask in enumerate(ENCODER_MASKS)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:enable_nested_tensor is True")
@pytest.mark.parametrize(("case", "mask", "dtype"), PAIRS)
def test_a_fresh_adapter_changes_nothing_of_an_encoder(case, mask, dtype):
    """Padding comes out as zeros of a nested tensor, or as other numbers where the kernel is held off."""
    padding = ENCODER_MASKS[mask].get("src_key_padding_mask", torch.zeros(3, LENGTH).bool())
    for nested, targets in [*((True, targets) for targets in INSIDE), (False, "all-linear")]:
        plain = encoder(case, dtype, nested)
        model, x = copy.deepcopy(plain), tokens(dtype)
        inject(model, LoRAConfig(r=2, target_modules=targets))
        want, got = encoded(plain, x, mask), encoded(model, x, mask)
        if targets == ["self_attn"]:
            assert torch.equal(got, want)
        assert relative(got[~padding], want[~padding]) < 2 * TOLERANCE[dtype]
        with disabled(model):
            assert torch.equal(encoded(model, x, mask), want)
        stir(model)
        adapted = encoded(model, x, mask)
        assert relative(adapted[~padding], want[~padding]) > 1e-2
        merged = copy.deepcopy(model)
        merge(merged)
        assert relative(encoded(merged, x, mask)[~padding], adapted[~padding]) < 2 * TOLERANCE[dtype]
        assert torch.equal(encoded(remove(model), x, mask), want)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"attn_mask": CAUSAL, "need_weights": False}], ids=["plain", "causal"])
def test_an_empty_batch_stays_empty(options, training):
    model, plain = attention(), attention()
    inject(model, LoRAConfig(r=2, target_modules=["attn"]))
    x = torch.empty(0, LENGTH, WIDTH)
    got, want = (call(m.train(training), x, options) for m in (model, plain))
    assert [t.shape for t in got] == [t.shape for t in want]
