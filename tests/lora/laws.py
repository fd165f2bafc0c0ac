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
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.inject import adapted_layers
from tests.lora.coverage import note

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-2}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def relative(got, want):
    """||got - want|| / ||want||, in float64."""
    got, want = got.detach().double(), want.detach().double()
    return float(torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want).clamp_min(1e-300))


def stir(model, size=0.3, seed=7):
    """Give every tensor of the adapter values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
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


def check_laws(make, run, config, dtype, tmp_path, *, grads=True, adapted_differs=True):
    """Laws 1, 2, 3, 6 and 7, `disabled`, `remove`, copies, and finite gradients, for one model.

    `make()` builds the plain model, `run(model)` gives one output tensor of it.
    """
    plain = make().to(dtype).eval().requires_grad_(False)
    keys, types = list(plain.state_dict()), [type(m) for m in plain.modules()]
    model = copy.deepcopy(plain)
    before = fingerprint(plain)
    output = still(run, plain)
    report = inject(model, config)
    check_fresh(plain, model, run)
    assert [k for k in model.state_dict() if k in set(keys)] == keys, "the original names survive"
    assert not any(key.startswith("lora_") for key in plain.state_dict())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.trainable == trainable == sum(t.numel() for t in adapter_tensors(model).values())
    assert all(t.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for t in factors(model))

    stir(model)
    adapted = run(model)
    assert torch.isfinite(adapted).all()
    if adapted_differs:
        assert not torch.equal(adapted, output), "the adapter counts"
    if grads:
        check_training_moves_only_adapters(model, run)
    assert fingerprint(model).digest == before.digest, "W0 never moves"
    with disabled(model):
        assert torch.equal(still(run, model), output), "disabled is the plain model"
    adapted = run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin), adapted), "a copy computes the same"
        assert torch.equal(still(run, remove(twin)), output)

    directory = save_adapter(model, tmp_path / "a")
    again = copy.deepcopy(plain)
    load_adapter(again, directory)
    same = {key: torch.equal(t, adapter_tensors(model)[key]) for key, t in adapter_tensors(again).items()}
    assert same
    assert all(same.values()), "what is saved is what is loaded"
    assert torch.equal(run(again), adapted)
    written = (directory / "adapter_model.safetensors").read_bytes()
    assert (save_adapter(again, tmp_path / "b") / "adapter_model.safetensors").read_bytes() == written

    check_strength(plain, model, run, tmp_path)
    merged = copy.deepcopy(model)
    merge(merged)
    assert relative(run(merged), adapted) <= TOLERANCE[dtype], "merged equals adapted"
    assert relative(still(run, merged), still(run, model)) <= TOLERANCE[dtype], "and without gradients"
    for left in (merged, remove(model)):
        assert list(left.state_dict()) == keys
        assert [type(m) for m in left.modules()] == types
    assert torch.equal(still(run, model), output)
    assert fingerprint(model).digest == before.digest
    note(dtype=dtype, report=report)
    return report


def check_strength(plain, model, run, tmp_path):
    """Strength 0 is the base and 1 the adapter, bit for bit; at 0.4 merged, saved and live models compute the same."""
    base, adapted, dtype = still(run, plain), still(run, model), still(run, plain).dtype
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
    assert relative(still(run, again), part) <= TOLERANCE[dtype], "what is saved at a strength is loaded with it"
    merge(merged, scale=0.4)
    partly, fully = (dict(m.named_parameters(remove_duplicate=False)) for m in (merged, merge_of(model)))
    for name, weight in plain.named_parameters(remove_duplicate=False):
        want = weight.double() + 0.4 * (fully[name].double() - weight.double())
        assert relative(partly[name], want) <= TOLERANCE[dtype], f"{name} is W0 + 0.4 (W - W0)"
    assert relative(still(run, merged), part) <= TOLERANCE[dtype], "merged at a strength equals scaled to it"
    merge(nothing, scale=0)
    nothing = dict(nothing.named_parameters(remove_duplicate=False))
    assert all(torch.equal(nothing[n], weight) for n, weight in plain.named_parameters(remove_duplicate=False))


def merge_of(model):
    """A merged copy."""
    merged = copy.deepcopy(model)
    merge(merged)
    return merged


def factors(model):
    return [t for key, t in adapter_tensors(model).items() if ".lora_copy." not in f".{key}"]


def check_training_moves_only_adapters(model, run, steps=3):
    """Finite gradients at every adapter, and only there."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        run(model).float().pow(2).mean().backward()
        if step == 0:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None, f"no gradient at {name}"
                    assert torch.isfinite(parameter.grad).all(), f"gradient at {name}"
                else:
                    assert parameter.grad is None
        optimizer.step()


def check_meta(make, config):
    """Injection works on the meta device, and filling the model starts the factors."""
    with torch.device("meta"):
        model = make()
    inject(model, config)
    assert all(t.device.type == "meta" for t in model.state_dict().values())
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Module) and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, layer in adapted_layers(model):
        zero = [not tensor.any() for tensor in (layer.lora_A, layer.lora_B)]
        assert sum(zero) == 1, f"one of A and B of '{name}' starts at zero, the other does not"
        assert torch.isfinite(layer.lora_A).all()
        assert torch.isfinite(layer.lora_B).all()
    return model


def check_peft_opens_ours(make, run, config, tmp_path, tolerance=1e-6):
    """PEFT computes from our directory what we compute."""
    plain = make().eval()
    model = copy.deepcopy(plain)
    inject(model, config)
    stir(model)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    with torch.no_grad():
        assert relative(run(theirs), run(model)) <= tolerance
        assert relative(run(plain), run(model)) > 1e-3
    return theirs


def check_we_open_pefts(make, run, peft_config, tmp_path, tolerance=1e-6):
    """We compute from PEFT's directory what PEFT computes."""
    plain = make().eval()
    theirs = peft.get_peft_model(copy.deepcopy(plain), peft_config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                assert "lora_" in name or "trainable_tokens" in name
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    model = copy.deepcopy(plain)
    load_adapter(model, tmp_path / "theirs")
    with torch.no_grad():
        assert relative(run(model), run(theirs)) <= tolerance
        assert relative(run(plain), run(model)) > 1e-3
    return model


def config(**kwargs):
    return LoRAConfig(**{"r": 2, "alpha": 3.0, **kwargs})
