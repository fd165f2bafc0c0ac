"""Silent faults that a review found, each with the model that showed it."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from lora_lightning import LoRAConfig, disabled, inject, load_adapter, remove, save_adapter
from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.frozen.fingerprint import fingerprint
from tests.factories import move


def test_batch_statistics_do_not_move_in_train_mode(tmp_path):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)).eval()
    x = torch.randn(6, 3, 4, 4)
    model = copy.deepcopy(plain)
    inject(model, LoRAConfig(r=2, target_modules=["0", "4"]))
    before = fingerprint(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model[1].training, "modes are kept"
    assert fingerprint(model) == before
    with disabled(model), torch.no_grad():
        assert torch.equal(model(x), plain.requires_grad_(False)(x))
    again = copy.deepcopy(plain)
    load_adapter(again, save_adapter(model, tmp_path))
    assert torch.equal(again(x), model(x))
    assert type(remove(model)[1]) is nn.BatchNorm2d


def test_instance_norms_statistics_are_part_of_w0():
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.InstanceNorm1d(3, track_running_stats=True)).train()
    model(torch.randn(4, 3, 9) + 1)
    before = model[1].running_mean.clone()
    expected = model.eval()(torch.ones(4, 3, 9))
    inject(model.train(), LoRAConfig(r=1, target_modules=["0"]))
    assert torch.equal(model(torch.ones(4, 3, 9)), expected)
    assert torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 8, 3), lambda: nn.Linear(5, 8), lambda: nn.Embedding(9, 8)])
def test_a_fresh_dora_changes_nothing_under_autocast(make):
    plain = nn.Sequential(make(), nn.Tanh()).eval().requires_grad_(False)
    shapes = {nn.Conv2d: torch.randn(2, 3, 5, 5), nn.Linear: torch.randn(2, 5), nn.Embedding: torch.arange(9)}
    x = shapes[type(plain[0])]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = plain(x)
        inject(plain, LoRAConfig(r=2, target_modules=["0"], use_dora=True))
        assert torch.equal(plain(x), before)
    move(plain)
    assert torch.isfinite(plain(x)).all()


def test_a_keyword_that_is_mistyped_or_finds_no_layer_is_answered_by_what_there_is():
    for word, meant in (("all-liner", "'all-linear'"), (["query-valeu"], "'query-value'")):
        with pytest.raises(TargetError, match=meant):
            inject(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), LoRAConfig(r=1, target_modules=word))
    with pytest.raises(TargetError, match=r"adaptable by name: conv1, layer1\.0\.conv1"):
        inject(torchvision.models.resnet18(weights=None), LoRAConfig())
