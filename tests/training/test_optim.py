"""The schedule against transformers' own, LoRA+ against PEFT's, and the groups against what trains."""

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import Adafactor, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from lora_lightning import LoRAConfig, LoRAError, WarmupDecay, inject
from lora_lightning.training.optim import make_optimizer, parameter_groups, schedule_entry


def rates(make, steps=20):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler, seen = make(optimizer), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize(("warmup", "steps"), [(4, 4), (0.2, 4), (0, 0)])
def test_decay_is_that_of_transformers_and_constant_stays_after_the_warm_up(warmup, steps):
    def ours(decay):
        return rates(lambda o: WarmupDecay(o, warmup=warmup, decay=decay, total_steps=20))

    assert ours("linear") == pytest.approx(rates(lambda o: get_linear_schedule_with_warmup(o, steps, 20)))
    assert ours("cosine") == pytest.approx(rates(lambda o: get_cosine_schedule_with_warmup(o, steps, 20)))
    assert ours("constant")[steps:] == [0.5] * (20 - steps)


def small(**lora):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    if lora:
        inject(model, LoRAConfig(r=2, **lora))
    return model


def of_groups(optimizer, key):
    return {group["name"]: group[key] for group in optimizer.param_groups}


def test_groups_hold_what_trains_once_and_decay_no_vector():
    model = small(target_modules=["0"], modules_to_save=["2"], use_dora=True)
    groups = {group["name"]: group for group in parameter_groups(model)}
    held = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [p.shape for p in groups["B"]["params"]] == [model[0].lora_B.shape]
    assert {p.dim() for p in groups["vectors"]["params"]} == {1}
    optimizer = make_optimizer(model, lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1))
    assert of_groups(optimizer, "weight_decay") == {"matrices": 0.1, "B": 0.1, "vectors": 0.0}


def test_lora_plus_steps_as_pefts_does():
    model = small(alpha=4, target_modules=["0", "2"])
    theirs = get_peft_model(small(), LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"]))
    for layer in (0, 2):
        other = theirs.base_model.model[layer]
        for name in ("lora_A", "lora_B"):
            value = torch.randn_like(getattr(model[layer], name))
            getattr(model[layer], name).data.copy_(value)
            getattr(other, name)["default"].weight.data.copy_(value)
    ours = make_optimizer(model, lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0), b_lr_ratio=16)
    peft = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, weight_decay=0.0)
    x = torch.randn(5, 6)
    for _ in range(3):
        for network, optimizer in ((model, ours), (theirs, peft)):
            network(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model(x), theirs(x))
    assert of_groups(ours, "lr") == {"matrices": 1e-3, "B": 16e-3}


def test_a_rate_that_is_a_tensor_is_changed_for_b_alone_and_one_that_the_optimizer_sets_is_kept():
    model = small(target_modules=["0"])
    made = make_optimizer(model, lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(1e-3)), b_lr_ratio=16)
    assert {k: float(v) for k, v in of_groups(made, "lr").items()} == pytest.approx({"matrices": 1e-3, "B": 16e-3})
    own = functools.partial(Adafactor, lr=None, warmup_init=True)
    assert set(of_groups(make_optimizer(model, own), "lr").values()) == {None}
    with pytest.raises(LoRAError, match="b_lr_ratio=16 multiplies B's learning rate, and Adafactor sets its rates"):
        make_optimizer(model, own, b_lr_ratio=16)


def test_a_schedule_of_one_rate_does_not_undo_lora_plus():
    made = make_optimizer(small(target_modules=["0"]), functools.partial(torch.optim.SGD, lr=1e-3), b_lr_ratio=16)
    with pytest.raises(LoRAError, match="b_lr_ratio=16 is undone by OneCycleLR"):
        schedule_entry(torch.optim.lr_scheduler.OneCycleLR(made, 0.1, 9), "step", None, None, 16)
