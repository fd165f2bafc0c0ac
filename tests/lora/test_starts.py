"""The inits of A and B: their own definitions, PEFT's values, and an export that loses nothing."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from lora_lightning import LoRAConfig, LoRAError, inject, load_adapter, remove, save_adapter
from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.init import from_weight as inits
from lora_lightning.lora.inject import adapted_layers
from tests.factories import assert_same, llama, snapshot
from tests.lora.kinds import batches, conv1d, inputs, net, shake, square_loss


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("make", "targets"), [(net, ["up", "down", "square"]), (conv1d, ["0", "2"])])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora_start_from_w0(init, make, targets, rslora):
    """PiSSA from its best approximation, in balance; OLoRA from its first r columns by QR. W0 as out by in."""
    model = make().double()
    inject(model, LoRAConfig(r=2, alpha=6.0, target_modules=targets, init=init, use_rslora=rslora))
    for _, layer in adapted_layers(model):
        W0 = layer.weight if make is net else layer.weight.T
        U, S, Vh = torch.linalg.svd(W0)
        Q, R = torch.linalg.qr(W0)
        best = U[:, :2] @ torch.diag(S[:2]) @ Vh[:2] / layer.lora_settings.scale
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, best if init == "pissa" else Q[:, :2] @ R[:2])
        if init == "pissa":
            torch.testing.assert_close(layer.lora_B.square().sum(0), layer.lora_A.square().sum(1))


def test_fast_pissa_nears_pissa():
    torch.manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))
    weight = U @ torch.diag(2.0 ** -torch.arange(20.0, dtype=torch.float64)) @ U.T
    A, B = inits.pissa(weight, 4, 1.5)
    fast_A, fast_B = inits.pissa(weight, 4, 1.5, niter=16)
    torch.testing.assert_close(fast_B @ fast_A, B @ A, rtol=1e-8, atol=1e-10)


def test_orthogonal_starts_on_orthogonal_halves():
    model = net(torch.float64)
    inject(model, LoRAConfig(r=4, init="orthogonal"))
    for _, layer in adapted_layers(model):
        assert (layer.lora_B @ layer.lora_A).abs().max() < 1e-14
        assert min(layer.lora_A.norm(), layer.lora_B.norm()) > 0.1


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x, attention_mask):
        return self.a(input=x)


def test_eva_takes_the_main_directions_of_all_the_inputs_but_padding():
    model, mask = Masked().double(), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    batches = [{"x": torch.randn(2, 5, 6).double(), "attention_mask": mask} for _ in range(3)]
    inject(model, LoRAConfig(r=4, init="eva", target_modules=["a"]), data=batches)
    _, _, Vh = torch.linalg.svd(torch.cat([batch["x"][mask.bool()] for batch in batches]))
    torch.testing.assert_close((model.a.lora_A.data @ Vh[:4].T).abs(), torch.eye(4).double(), rtol=0, atol=1e-8)
    assert (model.a.lora_B.any().item(), "lora_A0" in model.a.lora_tensors()) == (False, False)


def test_calibration_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 6))
    model[0].eval()
    before, data = snapshot(model), [torch.randn(5, 4) for _ in range(3)]
    config = LoRAConfig(r=2, init="lora_ga", target_modules=["0", "3"])
    inject(model, config, data=data, loss=lambda m, x: m(x).square().sum())
    assert all(p.grad is None for p in model.parameters())
    assert_same(remove(model), before, but=("trains",))


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


def test_the_first_step_from_lora_ga_is_the_gradients_best_approximation():
    """Theorem 3.1 of the paper: a small step of A and B moves W by -G on its 2 r first singular directions.

    A holds the first r of them and B the next, both of the paper's size.
    """
    plain, model, data = seeded_llama().eval(), seeded_llama().train(), loader()
    sum(plain(**batch).loss for batch in data).backward()
    inject(model, LoRAConfig(r=2, init="lora_ga", target_modules="attention"), data=data)
    model.eval()
    sum(model(**batch).loss for batch in data).backward()
    for name, layer in adapted_layers(model):
        step = layer.lora_B.grad @ layer.lora_A + layer.lora_B @ layer.lora_A.grad
        U, S, Vh = torch.linalg.svd(plain.get_submodule(name).weight.grad)
        best = U[:, :4] @ torch.diag(S[:4]) @ Vh[:4]
        assert torch.nn.functional.cosine_similarity(step.flatten(), best.flatten(), dim=0) > 1 - 1e-4
        size = math.sqrt(math.sqrt(layer.weight.shape[0]) / inits.LORA_GA_GAMMA)
        torch.testing.assert_close(layer.lora_A @ Vh[:2].T @ Vh[:2], layer.lora_A, rtol=1e-3, atol=1e-3 * size)
        torch.testing.assert_close(U[:, 2:4] @ U[:, 2:4].T @ layer.lora_B, layer.lora_B, rtol=1e-3, atol=1e-3 * size)
        for norms in (layer.lora_A.norm(dim=1), layer.lora_B.norm(dim=0)):
            torch.testing.assert_close(norms, torch.full((2,), size), rtol=1e-4, atol=0)
