"""Weighted combinations of adapters: against sums of merged weights in float64, dense SVDs, the papers, and PEFT."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lightning import AdapterBank, LoRAError, merge, save_adapter
from lora_lightning.lora.bank.combine import truncate_pair
from lora_lightning.lora.errors import ConfigError
from tests.factories import assert_same, snapshot
from tests.lora.bank_support import ZOO, adapters, base, run_net, shake, trained
from tests.lora.kinds import inputs, net, run_conv

SUMMABLE = [name for name in ZOO if name not in {"dora", "heads", "biases", "lora_bias", "tokens"}]
WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.3}


def updates_of(name, folder):
    """W - W0 of every weight, by each adapter merged alone: what any combination is defined on."""
    plain = base(name).state_dict()
    found = {}
    for letter, (_, model) in adapters(name, folder).items():
        merge(model)
        found[letter] = {key: tensor - plain[key] for key, tensor in model.state_dict().items()}
    return found


def bank_of(name, folder):
    bank = AdapterBank(base(name))
    for letter, (directory, _) in adapters(name, folder).items():
        bank.load(letter, directory)
    return bank


def merged_with(bank, name):
    bank.activate(name)
    plain = base_state(bank)
    merge(bank.model)
    return {key: tensor - plain[key] for key, tensor in bank.model.state_dict().items()}


def base_state(bank):
    return {key: t.clone() for key, t in bank.model.state_dict().items() if "lora_" not in key}


@pytest.mark.parametrize("name", SUMMABLE)
def test_a_concatenation_is_the_weighted_sum(name, tmp_path):
    """For every kind of layer, ranks that add up, modules that only one adapts, weights below zero."""
    bank, own = bank_of(name, tmp_path), updates_of(name, tmp_path)
    weights = {letter: WEIGHTS[letter] for letter in own}
    report = bank.combine("mix", weights)
    assert report.error == 0.0
    got = merged_with(bank, "mix")
    for key in got:
        wanted = sum(w * own[letter][key] for letter, w in weights.items())
        assert (got[key] - wanted).abs().max() <= 1e-12 * max(1.0, float(wanted.abs().max())), key
    assert any(tensor.abs().max() > 0.01 for tensor in got.values())


def test_ranks_add_up_and_forward_is_the_sum_of_updates(tmp_path):
    bank = bank_of("linear", tmp_path)
    report = bank.combine("mix", {"a": 2, "b": -1})
    assert report.ranks == {"up": 6, "square": 6, "down": 2}
    bank.activate("mix")
    x = torch.randn(5, 12, dtype=torch.float64)
    up = bank.model.up
    s = 8 / 2**1.0, 8 / 4**0.5
    (_, a), (_, b) = adapters("linear", tmp_path).values()
    wanted = nn.functional.linear(x, up.weight, up.bias) + 2 * 2.0 * (x @ a.up.lora_A.T) @ a.up.lora_B.T
    wanted = wanted - s[1] * (x @ b.up.lora_A.T) @ b.up.lora_B.T
    torch.testing.assert_close(up(x), wanted, rtol=1e-12, atol=1e-12)


def stacked(update, name, key):
    """A weight's update as the matrices that are factored apart."""
    if name == "groups":
        return list(update.flatten(1).chunk(2))
    if name == "experts" and update.dim() == 3:
        return list(update)
    return [update.flatten(1)]


@pytest.mark.parametrize("name", ["linear", "starts", "conv", "groups", "experts", "gpt2", "embedding", "attention"])
def test_a_chosen_rank_is_the_best_of_it_and_says_what_it_lacks(name, tmp_path):
    """Eckart and Young, by a dense SVD of the sum; the error of every module and of all together."""
    bank, own = bank_of(name, tmp_path), updates_of(name, tmp_path)
    weights = {letter: WEIGHTS[letter] for letter in own}
    full = {key: sum(w * own[letter][key] for letter, w in weights.items()) for key in own["a"]}
    report = bank.combine("best", weights, "svd", rank=2)
    got = merged_with(bank, "best")
    lost = wanted = 0.0
    for key, update in full.items():
        blocks = stacked(update, name, key) if update.dim() > 1 and update.abs().max() > 0 else []
        each = 1 if name == "groups" else 2
        sigmas = [torch.linalg.svdvals(block) for block in blocks]
        left, all_ = (float(sum(s[k:].square().sum() for s in sigmas)) for k in (each, 0))
        assert float((got[key] - update).square().sum()) == pytest.approx(left, rel=1e-9, abs=1e-22)
        lost, wanted = lost + left, wanted + all_
        module = next((m for m in report.errors if key in (m, f"{m}.weight", f"{m}.in_proj_weight")), None)
        if module:
            assert report.errors[module] == pytest.approx((left / all_) ** 0.5, rel=1e-6, abs=1e-12)
    assert report.error == pytest.approx((lost / wanted) ** 0.5, rel=1e-6)
    assert 0 < report.error < 1


def test_the_svd_never_forms_the_update():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.numel())
            return out

    A, B = torch.randn(12, 300, dtype=torch.float64), torch.randn(200, 12, dtype=torch.float64)
    with Largest() as largest:
        (low_a, low_b), (lost, wanted) = truncate_pair(A, B, 5)
    assert largest.size == 12 * 300
    sigma = torch.linalg.svdvals(B @ A)
    assert lost == pytest.approx(float(sigma[5:].square().sum()))
    assert wanted == pytest.approx(float(sigma.square().sum()))
    assert float((low_b @ low_a - B @ A).square().sum()) == pytest.approx(lost)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"method": "concat"}, {"combination_type": "cat"}),
        ({"method": "svd", "rank": 3}, {"combination_type": "svd", "svd_rank": 3}),
    ],
    ids=lambda options: str(next(iter(options.values()))),
)
def test_pefts_add_weighted_adapter_gives_the_same(ours, theirs, tmp_path):
    """On linear layers, where PEFT's own is right; and our combination opens in PEFT as it is."""
    for letter, r in (("a", 2), ("b", 4)):
        model = trained(net(), {"r": r, "target_modules": ["up", "down"]}, seed=r)
        save_adapter(model, tmp_path / letter)
    bank = AdapterBank(net())
    for letter in "ab":
        bank.load(letter, tmp_path / letter)
    bank.combine("mix", {"a": 0.6, "b": 0.8}, **ours)
    bank.activate("mix")
    other = peft.PeftModel.from_pretrained(net(), tmp_path / "a", adapter_name="a").eval()
    other.load_adapter(tmp_path / "b", adapter_name="b")
    other.add_weighted_adapter(["a", "b"], [0.6, 0.8], "mix", **theirs)
    other.set_adapter("mix")
    assert (run_net(bank.model) - other(inputs())).abs().max() < 1e-5
    opened = peft.PeftModel.from_pretrained(net(), save_adapter(bank.model, tmp_path / "mix")).eval()
    assert (run_net(bank.model) - opened(inputs())).abs().max() < 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_a_start_that_is_subtracted_is_a_part_of_the_sum(init):
    """As it is in a model that trains: a directory holds it folded in."""
    model, plain = trained(net(torch.float64), {"r": 2, "init": init}, seed=1), net(torch.float64)
    merged = copy.deepcopy(model)
    merge(merged)
    bank = AdapterBank(model, first="a")
    assert bank.combine("mix", {"a": -0.5}).ranks["up"] == 4
    got = merged_with(bank, "mix")
    for key, tensor in plain.state_dict().items():
        torch.testing.assert_close(got[key], -0.5 * (merged.state_dict()[key] - tensor), rtol=1e-12, atol=1e-12)


def test_a_head_that_one_adapter_saved_is_kept_and_two_must_agree():
    model = trained(net(torch.float64), {"r": 2, "modules_to_save": ["head"], "target_modules": ["up"]}, seed=1)
    bank = AdapterBank(model, first="a")
    head = model.head.lora_copy.weight.detach().clone()
    bank.activate(None)
    trained(model, {"r": 3, "target_modules": ["up"]}, seed=2)
    bank.add("b")
    bank.combine("mix", {"a": 1, "b": 1})
    bank.activate("mix")
    assert torch.equal(model.head.lora_copy.weight, head)
    bank.activate(None)
    trained(model, {"r": 2, "modules_to_save": ["head"], "target_modules": ["up"]}, seed=3)
    bank.add("c")
    before = snapshot(model)
    with pytest.raises(LoRAError, match="'a' and 'c' both saved 'head' in full, with different values"):
        bank.combine("more", {"a": 1, "c": 1})
    assert_same(model, before)
    assert bank.active == "c"


def test_a_head_that_one_saved_and_another_adapts_is_refused_and_runs_row_by_row():
    model = trained(net(torch.float64), {"r": 2, "modules_to_save": ["head"], "target_modules": ["up"]}, seed=1)
    bank, x = AdapterBank(model, first="a"), inputs(torch.float64)
    bank.activate(None)
    trained(model, {"r": 3, "target_modules": ["up", "head"]}, seed=2)
    bank.add("b")
    with pytest.raises(LoRAError, match="'a' saved 'head' in full, and another adapts 'head' by A and B"):
        bank.combine("mix", {"a": 1, "b": 1})
    with bank.rows(["a", "b"]):
        got = model(x)
    for i, name in enumerate("ab"):
        bank.activate(name)
        assert (got[i] - model(x)[i]).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dora", "cannot combine 'a': its 'up' has DoRA's magnitudes"),
        ("biases", "cannot combine 'a': its '.*' has a trained bias"),
        ("lora_bias", "cannot combine 'a': its 'up' has a bias of B"),
        ("tokens", "cannot combine 'a': its 'embed' has trained token rows"),
    ],
)
def test_what_has_no_sum_is_refused_by_name(name, message, tmp_path):
    bank = bank_of(name, tmp_path)
    bank.activate("b")
    before = snapshot(bank.model)
    with pytest.raises(LoRAError, match=message):
        bank.combine("mix", {"a": 1.0, "b": 1.0})
    assert_same(bank.model, before)
    assert bank.names == ["a", "b"]


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({"a": 1}, {"method": "cat"}, "method must be one of concat, svd, .*got 'cat'"),
        ({"a": 1}, {"method": "svd"}, "'svd' needs the rank of the result"),
        ({"a": 1}, {"rank": 4}, "'concat' has the ranks of the adapters added up"),
        ({"a": 1}, {"density": 0.5}, "density was removed: take 'concat' or 'svd'"),
        ({"a": 1}, {"method": "ties", "density": 0.2}, "method 'ties' was removed: .* PEFT .*'ties_svd'"),
        ({"a": 1}, {"method": "dare", "seed": 1}, "method 'dare' was removed: .*'dare_linear_svd'"),
        ({"a": 1}, {"method": "magnitude"}, "method 'magnitude' was removed"),
        ({"a": 1}, {"method": "svd", "rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"a": float("nan")}, {}, "the weight of 'a' must be a finite number, got nan"),
        ({}, {}, "weights must map names of adapters to numbers"),
        ({"z": 1}, {}, "no adapter 'z' here, there are a, b"),
    ],
    ids=str,
)
def test_a_recipe_that_means_nothing_is_refused(weights, options, message, tmp_path):
    bank = bank_of("linear", tmp_path)
    with pytest.raises(ConfigError, match=message):
        bank.combine("mix", weights, **options)
    assert bank.names == ["a", "b"]


def test_a_rank_that_groups_cannot_share_is_refused(tmp_path):
    with pytest.raises(LoRAError, match="rank=3 is no multiple of the 2 groups of the convolution '1'"):
        bank_of("groups", tmp_path).combine("mix", {"a": 1}, "svd", rank=3)


def test_a_combination_trains_on(tmp_path):
    bank = bank_of("conv", tmp_path)
    bank.combine("mix", {"a": 1, "b": 1})
    bank.activate("mix")
    before = run_conv(bank.model, "2d")
    shake(bank.model, seed=1)
    assert not torch.equal(run_conv(bank.model, "2d"), before)
