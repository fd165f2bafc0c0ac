"""Adapters on quantized bases: bitsandbytes NF4 and int8, torchao weight-only int8, on the CPU and on CUDA."""

import copy
import io
import sys
from functools import partial

import pytest
import torch
from peft import PeftModel
from torch import nn

from lora_lightning import LoRAConfig, disabled, inject, load_adapter, merge, remove, save_adapter
from lora_lightning.lora.errors import LoRAError, MergeError
from lora_lightning.lora.formats.peft.load import load_tensors
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.frozen.quantization import hold_packing, plain_weight
from lora_lightning.lora.frozen.tensors import adapter_tensors, base_tensors
from lora_lightning.lora.inject import adapted_layers
from tests.lora import kinds
from tests.lora.kinds import shake

bnb = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")

QUANTISED = ["up", "down", "square"]
Net = partial(kinds.Net, 64, 128, 64)
"""Widths in multiples of 64, which bitsandbytes' 4-bit kernel for the CPU asks for."""
HERE = torch.device("cpu")
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: a machine with one runs these laws")


@pytest.fixture(autouse=True, params=["cpu", pytest.param("cuda", marks=no_cuda)])
def device(request, monkeypatch):
    """Where every model and input of this file lies."""
    monkeypatch.setattr(sys.modules[__name__], "HERE", torch.device(request.param))


def inputs(dtype=torch.float32):
    return torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).to(HERE, dtype)


def _swap(model, make):
    for name in QUANTISED:
        old = model.get_submodule(name)
        new = make(old)
        new.load_state_dict(old.state_dict())
        if new.bias is not None:
            new.bias.data = new.bias.data.to(old.bias.dtype)
        setattr(model, name, new)
    return model.to(HERE).eval()  # bitsandbytes quantizes on the way to a device


def _nf4(model):
    def make(old):
        return bnb.nn.Linear4bit(
            old.in_features, old.out_features, bias=old.bias is not None, quant_type="nf4",
            compress_statistics=True, compute_dtype=old.weight.dtype,
        )  # fmt: skip

    return _swap(model, make)


def _int8(model):
    def make(old):
        return bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=old.bias is not None, has_fp16_weights=False)

    return _swap(model, make)


def _torchao(model):
    config = torchao.Int8WeightOnlyConfig()
    torchao.quantize_(model, config, filter_fn=lambda module, name: name in QUANTISED)
    return model.eval()


SCHEMES = {"nf4": _nf4, "int8": _int8, "torchao": _torchao}
NAMES = {"nf4": "bitsandbytes 4-bit", "int8": "bitsandbytes 8-bit", "torchao": "torchao"}
each_scheme = pytest.mark.parametrize("scheme_name", SCHEMES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
OPTIONS = [{}, {"use_dora": True, "bias": "all"}, {"init": "pissa", "dropout": 0.2}]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")


def float_net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(HERE, dtype)


def base(scheme_name, dtype=torch.float32):
    """The backbone, without the lossy repacking that bitsandbytes does in eval on some CPUs."""
    model = SCHEMES[scheme_name](float_net(dtype))
    hold_packing(model)
    return model


def adapted(scheme_name, dtype=torch.float32, **options):
    model = SCHEMES[scheme_name](float_net(dtype))
    inject(model, LoRAConfig(r=4, **options))
    return model


def shape_of(model):
    return [(type(m), sorted(vars(m))) for m in model.modules()]


@each_dtype
@each_scheme
@each_option
def test_laws(scheme_name, dtype, options, tmp_path):
    """Laws 1, 2 and 7, `disabled`, `remove` and copies, on a base that is no matrix of floats."""
    model, x, output = adapted(scheme_name, dtype, **options), inputs(dtype), base(scheme_name, dtype)(inputs(dtype))
    assert torch.equal(model(x), output), "a fresh adapter changes nothing"
    factors = [p for _, layer in adapted_layers(model) for p in layer.lora_tensors().values()]
    assert {(p.device.type, p.dtype) for p in factors} == {(HERE.type, torch.float32)}
    before, keys = fingerprint(model), list(base_tensors(model))  # some schemes lay W0 out at the first forward
    trained = [p for p in model.train().parameters() if p.requires_grad]
    first, optimizer = [p.detach().clone() for p in trained], torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).float().square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(first, trained, strict=True))
    expected = model.eval()(x)
    assert fingerprint(model) == before, "W0's bytes never move"
    assert list(base_tensors(model)) == keys
    with disabled(model):
        assert torch.equal(model(x), output)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    if scheme_name == "nf4":  # int8 weights lose their scales when pickled, torchao's do not pickle, adapted or not
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)
    loaded = base(scheme_name, dtype)
    load_adapter(loaded, save_adapter(model, tmp_path))
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(loaded(x), expected, **close)
    if scheme_name != "int8" and dtype == torch.float32 and not options:
        torch.testing.assert_close(PeftModel.from_pretrained(base(scheme_name), tmp_path)(x), expected, **close)
    with pytest.raises(LoRAError, match=r"first up\.weight"):
        load_adapter(float_net(dtype), tmp_path)
    pristine = SCHEMES[scheme_name](float_net(dtype))
    assert shape_of(remove(model)) == shape_of(pristine)
    hold_packing(model)
    assert torch.equal(model(x), output)


@each_scheme
def test_gradients_are_those_on_the_dequantized_base(scheme_name):
    model, twin = shake(adapted(scheme_name)), float_net().eval()
    for name in QUANTISED:
        twin.get_submodule(name).weight.data = plain_weight(model.get_submodule(name))
    inject(twin, LoRAConfig(r=4))
    load_tensors(twin, {key: tensor.detach() for key, tensor in adapter_tensors(model).items()})
    close = 0.05 if scheme_name == "int8" else 1e-4  # int8 rounds inputs too
    found = []
    for one in (model, twin):
        x = inputs().requires_grad_()
        one(x).square().sum().backward()
        found.append([x.grad, *[tensor.grad for tensor in adapter_tensors(one).values()]])
    for mine, other in zip(*found, strict=True):
        assert (mine - other).norm() <= close * other.norm()


@each_dtype
@each_scheme
@pytest.mark.parametrize("options", [*OPTIONS, {"target_modules": ["square"]}], ids=str)
def test_a_merge_is_refused_unless_asked_to_dequantize_and_then_equals_the_adapted(scheme_name, dtype, options):
    """And leaves no quantized layer, adapted or not."""
    model, x = shake(adapted(scheme_name, dtype, **options)), inputs(dtype)
    expected, before, own = model(x), fingerprint(model), {name for name, _ in adapted_layers(model)}
    words = rf"is quantized \({NAMES[scheme_name]}\).*merge\(model, dequantize=True\)"
    with pytest.raises(MergeError, match=words):
        merge(model)
    assert torch.equal(model(x), expected)
    assert fingerprint(model) == before
    report = merge(model, dequantize=True)
    assert sorted(report.dequantized) == sorted(QUANTISED)
    assert report.kept.keys() >= own, "the share kept is noted for quantized layers too"
    plain = float_net(dtype).eval()
    assert shape_of(model) == shape_of(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(type(p) is nn.Parameter and p.dtype == dtype for p in model.parameters())
    exact = 1e-5 if scheme_name == "torchao" else 1e-4  # NF4's forward adds up in another order
    close = 0.03 if dtype == torch.bfloat16 or scheme_name == "int8" else exact
    assert (model(x) - expected).float().norm() < close * expected.float().norm()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), model(x))


def _gradients(model):
    model.train()(inputs()).square().sum().backward()
    return [t.grad for _, layer in adapted_layers(model) for t in layer.lora_tensors().values()]


def test_an_evaluation_before_or_after_the_injection_leaves_training_as_it_was():
    """bitsandbytes repacks a 4-bit weight in eval on some CPUs, roundingly and without a backward."""
    fresh, after, packed = shake(adapted("nf4")), shake(adapted("nf4")), _nf4(float_net())
    before = fingerprint(after)
    with torch.no_grad():
        after.eval()(inputs())
        packed(inputs())
    assert fingerprint(after) == before, "not while it is adapted"
    inject(packed, LoRAConfig(r=4))
    load_tensors(packed, {key: tensor.detach() for key, tensor in adapter_tensors(fresh).items()})
    for layer in (layer for _, layer in adapted_layers(packed)):
        assert plain_weight(layer).shape == (layer.out_features, layer.in_features), "and it is unpacked"
    for wanted, one, other in zip(*map(_gradients, (fresh, after, packed)), strict=True):
        assert torch.equal(one, wanted)
        assert (other - wanted).norm() < 0.02 * wanted.norm()  # its scales were rounded to bfloat16


@pytest.mark.parametrize("as_state_dict", [False, True])
@each_scheme
def test_loftq_takes_back_what_quantization_lost(scheme_name, as_state_dict):
    original = float_net()
    data = {key: tensor.cpu() for key, tensor in original.state_dict().items()} if as_state_dict else original
    model = base(scheme_name)
    before = fingerprint(model)
    lost = {name: plain_weight(model.get_submodule(name)) - original.get_submodule(name).weight for name in QUANTISED}
    inject(model, LoRAConfig(r=4, init="loftq"), data=data)
    assert fingerprint(model) == before
    for name, layer in adapted_layers(model):
        U, S, Vh = torch.linalg.svd(-lost[name])
        best = U[:, :4] @ torch.diag(S[:4]) @ Vh[:4]
        torch.testing.assert_close(layer.delta_weight(), best, rtol=1e-3, atol=1e-5)
        assert (lost[name] + layer.delta_weight()).norm() < 0.95 * lost[name].norm()


def test_loftq_needs_each_weight_in_its_shape():
    weights = float_net().cpu().state_dict()  # wherever the model is
    with pytest.raises(LoRAError, match=r"needs 'down.weight' of shape \(64, 128\), got nothing"):
        inject(base("nf4"), LoRAConfig(r=4, init="loftq"), data={k: v for k, v in weights.items() if "down" not in k})
    with pytest.raises(LoRAError, match=r"got shape \(3, 64\)"):
        inject(base("nf4"), LoRAConfig(r=4, init="loftq"), data={**weights, "up.weight": weights["head.weight"]})
    with pytest.raises(LoRAError, match="or its state dict, got list"):
        inject(base("nf4"), LoRAConfig(r=4, init="loftq"), data=[1])
