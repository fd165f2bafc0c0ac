"""The inits of A and B: their own definitions, PEFT's values, and an export that loses nothing."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from lora_lightning import LoRAConfig, LoRAError, inject, load_adapter, save_adapter
from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.init import from_weight as inits
from lora_lightning.lora.inject import adapted_layers
from tests.factories import assert_same, llama, snapshot
from tests.lora.kinds import batches, conv1d, inputs, net, shake, square_loss
from tests.lora.laws import DTYPES

SUBTRACTED = ["orthogonal", "pissa", "pissa_niter_4", "olora", "lora_ga"]


def started(init, dtype=torch.float64, r=4, alpha=6.0, **options):
    model = net(dtype)
    data = {"data": batches(dtype), "loss": square_loss} if init in {"eva", "lora_ga"} else {}
    inject(model, LoRAConfig(r=r, alpha=alpha, init=init, **options), **data)
    return model


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_is_the_best_approximation_of_w0(rslora):
    for _, layer in adapted_layers(started("pissa", use_rslora=rslora)):
        U, S, Vh = torch.linalg.svd(layer.weight)
        best = U[:, :4] @ torch.diag(S[:4]) @ Vh[:4]
        torch.testing.assert_close(layer.lora_settings.scale * layer.lora_B @ layer.lora_A, best)
        balance = layer.lora_B.square().sum(0), layer.lora_A.square().sum(1)
        torch.testing.assert_close(*balance)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_transposed_layer_starts_from_its_weight_as_out_by_in(init):
    model = conv1d().double()
    inject(model, LoRAConfig(r=2, alpha=3.0, target_modules=["0", "2"], init=init))
    W, layer = model[0].weight.T, model[0]
    U, S, Vh = torch.linalg.svd(W)
    Q, R = torch.linalg.qr(W)
    wanted = U[:, :2] @ torch.diag(S[:2]) @ Vh[:2] / 1.5 if init == "pissa" else Q[:, :2] @ R[:2]
    torch.testing.assert_close(layer.lora_B0 @ layer.lora_A0, wanted)


def test_fast_pissa_nears_pissa():
    torch.manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))
    weight = U @ torch.diag(2.0 ** -torch.arange(20.0, dtype=torch.float64)) @ U.T
    A, B = inits.pissa(weight, 4, 1.5)
    fast_A, fast_B = inits.pissa(weight, 4, 1.5, niter=16)
    torch.testing.assert_close(fast_B @ fast_A, B @ A, rtol=1e-8, atol=1e-10)


def test_orthogonal_starts_on_orthogonal_halves():
    for _, layer in adapted_layers(started("orthogonal")):
        assert (layer.lora_B @ layer.lora_A).abs().max() < 1e-14
        assert layer.lora_A.norm() > 0.1
        assert layer.lora_B.norm() > 0.1


def test_eva_takes_the_main_directions_of_all_the_inputs():
    model, data = net(torch.float64), batches(torch.float64)
    inject(model, LoRAConfig(r=4, init="eva", target_modules=["up"]), data=data)
    _, _, Vh = torch.linalg.svd(torch.cat([batch.flatten(0, -2) for batch in data]))
    cosines = (model.up.lora_A.data @ Vh[:4].T).abs()
    torch.testing.assert_close(cosines, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-8)
    assert not model.up.lora_B.any()
    assert "lora_A0" not in model.up.lora_tensors()


def test_eva_leaves_padding_out():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x, attention_mask):
            return self.a(x)

    x, mask = torch.randn(2, 5, 6), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    poisoned = x.masked_fill(~mask.bool().unsqueeze(-1), 1e4)
    models = [Masked(), Masked()]
    for model, rows in zip(models, (x, poisoned), strict=True):
        config = LoRAConfig(r=2, init="eva", target_modules=["a"])
        inject(model, config, data=[{"x": rows, "attention_mask": mask}])
    assert torch.equal(models[0].a.lora_A, models[1].a.lora_A)


def test_lora_ga_follows_the_gradient_of_w0():
    model = started("lora_ga", r=2)
    plain = net(torch.float64)
    sum(square_loss(plain, batch) for batch in batches(torch.float64)).backward()
    for name, layer in adapted_layers(model):
        U, _, Vh = torch.linalg.svd(plain.get_submodule(name).weight.grad)
        size = math.sqrt(math.sqrt(layer.weight.shape[0]) / inits.LORA_GA_GAMMA)
        A, B = layer.lora_A.data / size, layer.lora_B.data / size
        eye = torch.eye(2, dtype=torch.float64)
        torch.testing.assert_close((A @ Vh[:2].T).abs(), eye, rtol=0, atol=1e-6)
        torch.testing.assert_close((B.T @ U[:, 2:4]).abs(), eye, rtol=0, atol=1e-6)


def test_calibration_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 6))
    model[0].eval()
    modes = [m.training for m in model.modules()]
    stats = model[1].running_mean.clone()
    data = [torch.randn(5, 4) for _ in range(3)]
    config = LoRAConfig(r=2, init="lora_ga", target_modules=["0", "3"])
    inject(model, config, data=data, loss=lambda m, x: m(x).square().sum())
    assert [m.training for m in model.modules() if type(m) is not nn.Dropout or m is model[2]] == modes
    assert torch.equal(model[1].running_mean, stats)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("rslora", [False, True])
def test_exports_an_ordinary_adapter_of_twice_the_rank(rslora, tmp_path):
    """For PEFT too, as `test_laws.py` says of each init; also where that is above the weight's own rank."""
    model = shake(started("pissa", use_rslora=rslora, rank_pattern={"square": 2, "down": 10}))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    file = load_file(tmp_path / "adapter_model.safetensors")
    for name, shape in (("up", (8, 12)), ("square", (4, 10)), ("down", (20, 20))):
        assert file[f"base_model.model.{name}.lora_A.weight"].shape == shape
    ours = net(torch.float64)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(inputs(torch.float64)), model(inputs(torch.float64)), rtol=1e-12, atol=1e-13)
    assert ours.up.lora_settings.scale == pytest.approx(model.up.lora_settings.scale, rel=1e-15)


@settings(max_examples=20, deadline=None)
@given(
    init=st.sampled_from(["orthogonal", "pissa", "pissa_niter_2", "olora"]),
    shape=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    dtype=st.sampled_from(DTYPES),
    alpha=st.floats(0.1, 50.0),
    seed=st.integers(0, 99),
)
def test_any_start_changes_nothing_and_trains_the_difference(init, shape, dtype, alpha, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(*shape, dtype=dtype))
    x = torch.randn(3, shape[0], dtype=dtype)
    expected = model(x)
    inject(model, LoRAConfig(r=2, alpha=alpha, init=init, target_modules=["0"]))
    assert torch.equal(model(x), expected)
    layer = model[0]
    first = (layer.lora_B @ layer.lora_A).detach().double()
    shake(model)
    moved = (layer.lora_B @ layer.lora_A).detach().double() - first
    torch.testing.assert_close(
        layer.delta_weight().double(), layer.lora_settings.scale * moved, rtol=1e-4, atol=1e-4 * alpha
    )


def crash(model, batch):
    raise KeyError("labels")


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(12, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


ROW = torch.randn(1, 12)
NEEDS = r"needs inject\(model, config, data=...\)"


@pytest.mark.parametrize(
    ("make", "fields", "given", "error", "words"),
    [
        *[(net, {"init": init}, {}, LoRAError, f"init '{init}' {NEEDS}") for init in ("eva", "lora_ga", "loftq")],
        (net, {}, {"data": [ROW]}, LoRAError, "data is read by init eva, lora_ga, loftq only, and init is 'gaussian'"),
        (net, {"init": "lora_ga"}, {"data": [ROW]}, LoRAError, "needs a loss"),
        (net, {"init": "lora_ga"}, {"data": [], "loss": square_loss}, LoRAError, "data holds no batch"),
        (net, {"init": "lora_ga"}, {"data": [ROW], "loss": crash}, KeyError, "labels"),
        (net, {"init": "eva"}, {"data": [ROW]}, LoRAError, "needs at least r=2 independent inputs"),
        (Idle, {"init": "eva"}, {"data": batches()}, LoRAError, "the data never reached 'idle'"),
        (net, {"init": "lora_ga", "r": 7}, {"data": batches()}, TargetError, r"2 r = 14 .* set r to 6 or less .*'up'"),
        (net, {"init": "loftq"}, {"data": batches()}, TargetError, "'up', a Linear, is not quantized"),
    ],
)
def test_data_that_does_not_serve_is_refused_and_leaves_the_model_as_it_was(make, fields, given, error, words):
    model = make()
    targets = {"target_modules": ["used", "idle"]} if make is Idle else {}
    before = snapshot(model)
    with pytest.raises(error, match=words):
        inject(model, LoRAConfig(**{"r": 2, **fields, **targets}), **given)
    assert_same(model, before)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_unconverted_adapter_of_peft_is_read_with_its_start(init, tmp_path):
    """PEFT writes the factors and says in its config alone that s B0 A0 is missing from the base."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["up", "square"], init_lora_weights=init)
    theirs = shake(get_peft_model(net(), config).eval())
    theirs.save_pretrained(tmp_path)
    ours = net()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(inputs()), theirs(inputs()).detach(), rtol=1e-4, atol=1e-5)
    save_adapter(ours, tmp_path / "again")
    again = PeftModel.from_pretrained(net(), tmp_path / "again")
    torch.testing.assert_close(again(inputs()), ours(inputs()), rtol=1e-4, atol=1e-5)


# On a transformers model, which returns its own loss, from a DataLoader of padded batches.


def loader():
    ids = torch.randint(1, 32, (8, 6), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) < torch.randint(3, 7, (8, 1), generator=torch.Generator().manual_seed(1))).long()
    columns = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return DataLoader([{name: column[i] for name, column in columns.items()} for i in range(8)], batch_size=4)


def seeded_llama():
    torch.manual_seed(0)
    return llama(attention_dropout=0.1)


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_starts_from_a_data_loader(init):
    model, batch = seeded_llama().train(), next(iter(loader()))
    before = fingerprint(model)
    inject(model, LoRAConfig(r=2, init=init), data=loader())
    assert model.training
    assert fingerprint(model) == before
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, seeded_llama().eval()(**batch).logits)


def test_the_first_step_from_lora_ga_is_the_gradients_best_approximation():
    """Theorem 3.1 of the paper: a small step of A and B moves W by -G on its 2 r first singular directions."""
    plain, model, data = seeded_llama().eval(), seeded_llama().eval(), list(loader())
    sum(plain(**batch).loss for batch in data).backward()
    inject(model, LoRAConfig(r=2, init="lora_ga", target_modules="attention"), data=data)
    sum(model(**batch).loss for batch in data).backward()
    for name, layer in adapted_layers(model):
        step = layer.lora_B.grad @ layer.lora_A + layer.lora_B @ layer.lora_A.grad
        U, S, Vh = torch.linalg.svd(plain.get_submodule(name).weight.grad)
        best = U[:, :4] @ torch.diag(S[:4]) @ Vh[:4]
        assert torch.nn.functional.cosine_similarity(step.flatten(), best.flatten(), dim=0) > 1 - 1e-4
