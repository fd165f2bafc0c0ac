"""Weighted combinations of adapters: against sums of merged weights in float64, dense SVDs, the papers, and PEFT."""

import copy

import peft
import pytest
import torch

from lora_lightning import LoRAError, merge
from tests.factories import assert_same, snapshot
from tests.lora.bank_support import ZOO, adapters, bank_of, bank_over, base, run_net
from tests.lora.kinds import at, inputs, net

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


def merged_with(bank, name):
    bank.activate(name)
    plain = {key: t.clone() for key, t in bank.model.state_dict().items() if "lora_" not in key}
    merge(bank.model)
    return {key: tensor - plain[key] for key, tensor in bank.model.state_dict().items()}


@pytest.mark.parametrize("name", SUMMABLE)
def test_a_concatenation_is_the_weighted_sum(name, tmp_path):
    """For every kind of layer, ranks that add up, modules that only one adapts, weights below zero."""
    bank, own = bank_of(name, tmp_path), updates_of(name, tmp_path)
    weights = {letter: WEIGHTS[letter] for letter in own}
    report = bank.combine("mix", weights)
    assert report.error == 0.0
    assert name != "linear" or report.ranks == {"up": 6, "square": 6, "down": 2}, "ranks add up"
    got = merged_with(bank, "mix")
    for key in got:
        wanted = sum(w * own[letter][key] for letter, w in weights.items())
        assert (got[key] - wanted).abs().max() <= 1e-12 * max(1.0, float(wanted.abs().max())), key
    assert any(tensor.abs().max() > 0.01 for tensor in got.values())


def stacked(update, name):
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
        blocks = stacked(update, name) if update.dim() > 1 and update.abs().max() > 0 else []
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


SAME = [
    ({"method": "concat"}, {"combination_type": "cat"}),
    ({"method": "svd", "rank": 3}, {"combination_type": "svd", "svd_rank": 3}),
]


@pytest.mark.parametrize(("ours", "theirs"), SAME, ids=["concat", "svd"])
def test_pefts_add_weighted_adapter_gives_the_same(ours, theirs, tmp_path):
    """On linear layers, where PEFT's own is right; and our combination opens in PEFT as it is."""
    bank, weights = bank_over(net(), {"r": 2, **at("up", "down")}, {"r": 4, **at("up", "down")}), {"a": 0.6, "b": 0.8}
    bank.combine("mix", weights, **ours)
    bank.activate("mix")
    other = peft.PeftModel.from_pretrained(net(), bank.save("a", tmp_path / "a"), adapter_name="a").eval()
    other.load_adapter(bank.save("b", tmp_path / "b"), adapter_name="b")
    other.add_weighted_adapter(list(weights), list(weights.values()), "mix", **theirs)
    other.set_adapter("mix")
    assert (run_net(bank.model) - other(inputs())).abs().max() < 1e-5
    opened = peft.PeftModel.from_pretrained(net(), bank.save("mix", tmp_path / "mix")).eval()
    assert (run_net(bank.model) - opened(inputs())).abs().max() < 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_a_start_that_is_subtracted_is_a_part_of_the_sum(init):
    """As it is in a model that trains: a directory holds it folded in."""
    bank, plain = bank_over(net(torch.float64), {"r": 2, "init": init}), net(torch.float64).state_dict()
    merged = copy.deepcopy(bank.model)
    merge(merged)
    assert bank.combine("mix", {"a": -0.5}).ranks["up"] == 4
    got = merged_with(bank, "mix")
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(got[key], -0.5 * (tensor - plain[key]), rtol=1e-12, atol=1e-12)


UP, HEAD, ADAPTED_HEAD = at("up"), at("up", modules_to_save=["head"]), at("up", "head")


def test_a_head_that_one_adapter_saved_is_kept():
    bank = bank_over(net(torch.float64), UP, HEAD)
    head = bank.model.head.lora_copy.weight.detach().clone()
    bank.combine("mix", {"a": 1, "b": 1})
    bank.activate("mix")
    assert torch.equal(bank.model.head.lora_copy.weight, head)


BOTH, A = {"a": 1.0, "b": 1.0}, {"a": 1}
REFUSED = [
    ("dora", BOTH, {}, "cannot combine 'a': its 'up' has DoRA's magnitudes"),
    ("biases", BOTH, {}, "cannot combine 'a': its '.*' has a trained bias"),
    ("lora_bias", BOTH, {}, "cannot combine 'a': its 'up' has a bias of B"),
    ("tokens", BOTH, {}, "cannot combine 'a': its 'embed' has trained token rows"),
    ([HEAD, HEAD], BOTH, {}, "'a' and 'b' both saved 'head' in full, with different values"),
    ([HEAD, ADAPTED_HEAD], BOTH, {}, "'a' saved 'head' in full, and another adapts 'head' by A and B"),
    ("groups", A, {"method": "svd", "rank": 3}, "rank=3 is no multiple of the 2 groups of the convolution '1'"),
    ("linear", A, {"method": "cat"}, "method must be one of concat, svd, .*got 'cat'"),
    ("linear", A, {"method": "svd"}, "'svd' needs the rank of the result"),
    ("linear", A, {"rank": 4}, "'concat' has the ranks of the adapters added up"),
    ("linear", A, {"density": 0.5}, "density was removed: take 'concat' or 'svd'"),
    ("linear", A, {"method": "ties", "density": 0.2}, "method 'ties' was removed: .* PEFT .*'ties_svd'"),
    ("linear", A, {"method": "svd", "rank": 0}, "rank must be a whole number of at least 1, got 0"),
    ("linear", {"a": float("nan")}, {}, "the weight of 'a' must be a finite number, got nan"),
    ("linear", {}, {}, "weights must map names of adapters to numbers"),
    ("linear", {"aa": 1}, {}, "no adapter 'aa' here, there are a, b; did you mean 'a'"),
]


@pytest.mark.parametrize(("base", "weights", "options", "message"), REFUSED)
def test_what_has_no_sum_or_no_meaning_is_refused_by_name(base, weights, options, message, tmp_path):
    bank = bank_of(base, tmp_path) if isinstance(base, str) else bank_over(net(torch.float64), *base)
    bank.activate("b")
    before = snapshot(bank.model)
    with pytest.raises(LoRAError, match=message):
        bank.combine("mix", weights, **options)
    assert_same(bank.model, before)
    assert (bank.names, bank.active) == (["a", "b"], "b")
