"""The laws of design.md as checks that a test of any kind of layer can call."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, disabled, inject, load_adapter, merge, remove, save_adapter
from lora_lightning.lora.bank.strength import scaled
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.frozen.tensors import adapter_tensors, base_tensors, frozen_keys
from lora_lightning.lora.inject import adapted_layers, grafted_modules
from tests.factories import assert_same, move, snapshot
from tests.lora.kinds import SUBTRACTED

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-2}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def relative(got, want):
    """||got - want|| / ||want||, in float64."""
    got, want = got.detach().double(), want.detach().double()
    return float(torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want).clamp_min(1e-300))


def stir(model, size=0.3, seed=7):
    """Give every tensor of the adapter that trains values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in adapter_tensors(model).items():
            if not key.endswith(("lora_A0", "lora_B0")):
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_((size * noise).to(tensor.dtype))
    return model


def still(run, model):
    """What the model gives without gradients, where torch takes the kernels that it has for that."""
    with torch.no_grad():
        return run(model)


def check_fresh(plain, model, run):
    """Law 1, with torch's own settings; `plain` is frozen, since torch.matmul rounds by `requires_grad`."""
    assert torch.equal(still(run, model), still(run, plain)), "a fresh adapter changes nothing"
    with torch.enable_grad():
        got, want = run(model), run(plain)
    if any(isinstance(module, nn.MultiheadAttention) and module.batch_first for module in plain.modules()):
        # A frozen model's attention goes to a kernel without a backward, and a training one's cannot.
        assert relative(got, want) <= TOLERANCE[want.dtype]
    else:
        assert torch.equal(got, want)


def check_laws(make, run, config, dtype, tmp_path, *, data=None, tolerance=None, size=0.3):
    """Laws 1 to 4, 6, 7 and 10, `disabled`, `remove`, copies and resuming, for one model.

    `make()` builds the plain model, `run(model)` gives one output tensor of it; `data(dtype)` is for inits from data.
    """
    tolerance = tolerance or TOLERANCE[dtype]
    plain = make().to(dtype).eval().requires_grad_(False)
    before, output = snapshot(plain), still(run, plain)
    model = copy.deepcopy(plain)
    check_injected(plain, model, run, config, before, data(dtype) if data else {})
    w0 = fingerprint(model)
    adapted = run(stir(model, size))
    assert torch.isfinite(adapted).all()
    assert not torch.equal(adapted, output), "the adapter counts"
    check_training_moves_only_adapters(model, run)
    assert fingerprint(model) == w0, "W0 never moves"
    if config.dropout:
        model.train()
        assert not torch.equal(run(model), run(model)), "dropout is honoured, in training only"
        assert torch.equal(run(model.eval()), run(model))
    own = model.state_dict()
    assert all(torch.equal(own[key], t) for key, t in before["state"].items()), "nor what is trained as a copy"
    with disabled(model):
        with disabled(model):
            assert torch.equal(still(run, model), output), "disabled is the plain model"
        assert torch.equal(still(run, model), output)
    check_copies(plain, model, run, config, output)
    check_files(plain, model, run, tmp_path, tolerance)
    check_strength(plain, model, run, tmp_path, tolerance)
    adapted, merged = run(model), merge_of(model)
    assert relative(run(merged), adapted) <= tolerance, "merged equals adapted"
    assert relative(still(run, merged), still(run, model)) <= tolerance, "and without gradients"
    assert_same(merged, before, but=("state",))
    assert list(merged.state_dict()) == list(before["state"])
    assert_same(remove(model), before)
    assert torch.equal(still(run, model), output)
    inject(model, config, run_init=False)


def check_injected(plain, model, run, config, before, data):
    """A fresh adapter: the output, every name, tensor and class are the plain model's, and only what is new trains."""
    own = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    modules = dict(model.named_modules(remove_duplicate=False))
    report = inject(model, config, **data)
    now = dict(model.named_parameters(remove_duplicate=False))
    assert {name: id(now[name]) for name in own} == own, "the original names survive, and so do the tensors"
    assert [key for key in model.state_dict() if key in before["state"]] == list(before["state"])
    if not config.modules_to_save:
        assert list(base_tensors(model)) == list(before["state"])
        assert frozen_keys(model) == set(before["state"])
    for (name, module), (_, cls) in zip(modules.items(), before["classes"], strict=True):
        assert model.get_submodule(name) is module
        assert isinstance(module, cls)
    assert config.modules_to_save or fingerprint(model) == fingerprint(plain)
    check_fresh(plain, model, run)
    assert_same(merge_of(model), before, but=("state",) if config.init in SUBTRACTED or config.use_dora else ())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert report.trainable == sum(p.numel() for p in trained.values())
    assert trained.keys() <= adapter_tensors(model).keys()
    factor = torch.float64 if next(plain.parameters()).dtype == torch.float64 else torch.float32
    assert all(p.dtype == factor for name, p in trained.items() if ".lora_copy." not in f".{name}")


def check_copies(plain, model, run, config, output):
    """Copied, pickled or resumed from its state dict, a model computes the same, and is apart from the first."""
    adapted, resumed = run(model), copy.deepcopy(plain)
    inject(resumed, config, run_init=False)
    assert torch.equal(still(run, resumed), output), "what waits for its tensors is the plain model"
    resumed.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), resumed):
        assert torch.equal(run(twin), adapted)
        stir(twin)
        assert torch.equal(run(model), adapted)
        assert torch.equal(still(run, remove(twin)), output)


def check_files(plain, model, run, tmp_path, tolerance):
    """What is saved is what is loaded, and saving twice gives the same bytes."""
    adapted, tensors = run(model), adapter_tensors(model)
    directory, again = save_adapter(model, tmp_path / "a"), copy.deepcopy(plain)
    load_adapter(again, directory)
    loaded = adapter_tensors(again)
    assert loaded
    if any(key.endswith("lora_A0") for key in tensors):  # is exported as one adapter of twice the rank
        assert relative(run(again), adapted) <= tolerance
    else:
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in loaded.items())
        assert torch.equal(run(again), adapted)
    written = (directory / "adapter_model.safetensors").read_bytes()
    assert (save_adapter(again, tmp_path / "b") / "adapter_model.safetensors").read_bytes() == written


def check_strength(plain, model, run, tmp_path, tolerance):
    """Strength 0 is the base and 1 the adapter, bit for bit; at 0.4 merged, saved and live models compute the same."""
    base, adapted = still(run, plain), still(run, model)
    tensors = {key: tensor.detach().clone() for key, tensor in adapter_tensors(model).items()}
    with scaled(model, 0):
        assert torch.equal(still(run, model), base), "at strength 0 the model is its base"
    with scaled(model, 1):
        assert torch.equal(still(run, model), adapted), "at strength 1 it is what was trained"
    with scaled(model, 0.4):
        part, folder = still(run, model), save_adapter(model, tmp_path / "part")
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in adapter_tensors(model).items())
    assert torch.equal(still(run, model), adapted), "and afterwards again"
    again, merged, nothing = copy.deepcopy(plain), copy.deepcopy(model), copy.deepcopy(model)
    load_adapter(again, folder)
    assert relative(still(run, again), part) <= tolerance, "what is saved at a strength is loaded with it"
    merge(merged, scale=0.4)
    partly, fully = (dict(m.named_parameters(remove_duplicate=False)) for m in (merged, merge_of(model)))
    for name, weight in plain.named_parameters(remove_duplicate=False):
        want = weight.double() + 0.4 * (fully[name].double() - weight.double())
        assert relative(partly[name], want) <= tolerance, f"{name} is W0 + 0.4 (W - W0)"
    assert relative(still(run, merged), part) <= tolerance, "merged at a strength equals scaled to it"
    merge(nothing, scale=0)
    nothing = dict(nothing.named_parameters(remove_duplicate=False))
    assert all(torch.equal(nothing[n], weight) for n, weight in plain.named_parameters(remove_duplicate=False))


def merge_of(model):
    """A merged copy."""
    merged = copy.deepcopy(model)
    merge(merged)
    return merged


def check_training_moves_only_adapters(model, run, steps=3):
    """Finite gradients at every adapter, and only there; and the optimizer moves each tensor of it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    first = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        run(model).float().pow(2).mean().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"no gradient at {name}"
                assert torch.isfinite(parameter.grad).all(), f"gradient at {name}"
            else:
                assert parameter.grad is None
        optimizer.step()
    assert all(p.grad.any() for p in trained), "a gradient reaches each"
    assert not any(torch.equal(a, b) for a, b in zip(first, trained, strict=True))


def check_meta(make, run, config):
    """Injection on the meta device allocates nothing; where it is filled, A and B start, and nothing changes."""
    plain = make().eval().requires_grad_(False)
    with torch.device("meta"):
        model = make().eval()
    report = inject(model, config)
    assert all(t.device.type == "meta" for t in model.state_dict().values())
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.to_empty(device="cpu")
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert set(missing) == set(adapter_tensors(model))
    for _, module in grafted_modules(model):
        module.reset_lora_parameters()
    assert torch.equal(still(run, model), still(run, plain))
    for name, layer in adapted_layers(model):
        zero = [not tensor.any() for tensor in (layer.lora_A, layer.lora_B)]
        assert sum(zero) == (config.init not in SUBTRACTED), f"one of A and B of '{name}' starts at zero"
    assert not torch.equal(still(run, stir(model)), still(run, plain))


def check_peft_opens_ours(make, run, config, tmp_path, tolerance=1e-12, data=None):
    """PEFT computes from our directory what we compute, at any strength."""
    plain = make().double().eval()
    model = copy.deepcopy(plain)
    inject(model, config, **(data(torch.float64) if data else {}))
    stir(model)
    for scale in (1, 1.25, 0.3):
        with scaled(model, scale), torch.no_grad():
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), save_adapter(model, tmp_path)).eval()
            assert relative(run(theirs), run(model)) <= tolerance
            assert relative(run(plain), run(model)) > 1e-3


def check_we_open_pefts(make, run, peft_config, tmp_path, tolerance=1e-12):
    """We compute from PEFT's directory what PEFT computes, and it goes back."""
    plain = make().double().eval()
    theirs = peft.get_peft_model(copy.deepcopy(plain), peft_config).eval()
    move(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = copy.deepcopy(plain)
    load_adapter(model, tmp_path / "theirs")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(plain), save_adapter(model, tmp_path / "back")).eval()
    with torch.no_grad():
        assert relative(run(model), run(theirs)) <= tolerance
        assert relative(run(back), run(theirs)) <= tolerance
        assert relative(run(plain), run(model)) > 1e-3


def config(**kwargs):
    return LoRAConfig(**{"r": 2, "alpha": 3.0, **kwargs})
