"""The schedule against transformers' own, LoRA+ against PEFT's, and the groups against what trains."""

import functools

import pytest
import torch
from transformers import Adafactor, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from lora_lightning import LoRAConfig, LoRAError, WarmupDecay, inject
from lora_lightning.training.optim import make_optimizer, parameter_groups


def rates(make, steps=20):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler, seen = make(optimizer), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize(
    ("decay", "reference"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
@pytest.mark.parametrize(("warmup", "steps"), [(4, 4), (0.2, 4), (0, 0)])
def test_decay_is_that_of_transformers(decay, reference, warmup, steps):
    ours = rates(lambda o: WarmupDecay(o, warmup=warmup, decay=decay, total_steps=20))
    assert ours == pytest.approx(rates(lambda o: reference(o, steps, 20)))


def test_constant_stays_after_the_warm_up():
    assert rates(lambda o: WarmupDecay(o, warmup=2, decay="constant", total_steps=20))[2:] == [0.5] * 18


@pytest.mark.parametrize("warmup", [-0.1, 1.5])
def test_a_warm_up_that_means_nothing_is_refused(warmup):
    with pytest.raises(LoRAError, match="a share below 1 or a whole number"):
        rates(lambda o: WarmupDecay(o, warmup=warmup, total_steps=20))


def small():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))


def test_groups_hold_what_trains_once_and_decay_no_vector():
    model = small()
    inject(model, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["2"], use_dora=True))
    groups = {group["name"]: group for group in parameter_groups(model)}
    held = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [p.shape for p in groups["B"]["params"]] == [model[0].lora_B.shape]
    assert {p.dim() for p in groups["vectors"]["params"]} == {1}
    optimizer = make_optimizer(model, lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1))
    assert {g["name"]: g["weight_decay"] for g in optimizer.param_groups} == {"matrices": 0.1, "B": 0.1, "vectors": 0.0}


def test_lora_plus_steps_as_pefts_does():
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    model = small()
    theirs = get_peft_model(small(), LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"]))
    inject(model, LoRAConfig(r=2, alpha=4, target_modules=["0", "2"]))
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
    rates = {group["name"]: group["lr"] for group in ours.param_groups}
    assert rates == {"matrices": 1e-3, "B": 16e-3}


def test_a_rate_that_is_a_tensor_is_changed_for_b_alone():
    model = small()
    inject(model, LoRAConfig(r=2, target_modules=["0"]))
    made = make_optimizer(model, lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(1e-3)), b_lr_ratio=16)
    rates = {group["name"]: float(group["lr"]) for group in made.param_groups}
    assert rates == pytest.approx({"matrices": 1e-3, "B": 16e-3})


def test_an_optimizer_that_sets_its_own_rates_keeps_them():
    model = small()
    inject(model, LoRAConfig(r=2, target_modules=["0"]))
    own = functools.partial(Adafactor, lr=None, warmup_init=True)
    assert {group["lr"] for group in make_optimizer(model, own).param_groups} == {None}
    with pytest.raises(LoRAError, match="b_lr_ratio=16 multiplies B's learning rate, and Adafactor sets its rates"):
        make_optimizer(model, own, b_lr_ratio=16)


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(LoRAError, match="b_lr_ratio"):
        make_optimizer(small(), torch.optim.SGD, ratio)
