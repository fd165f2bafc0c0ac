import copy
import json

import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, LoRAError, inject, merge, remove
from lora_lightning.lora.errors import AdapterError, AdapterWarning, TargetError
from lora_lightning.lora.frozen.tensors import adapter_tensors, frozen_keys
from lora_lightning.lora.inject import modules_of_kind
from lora_lightning.lora.layers import LoRALinear, SavedCopy, TokenRows, TrainedBias, graft
from lora_lightning.lora.report import InjectionReport
from tests.factories import Own, assert_same, distance, folded, move, sequential, snapshot

SMALL = LoRAConfig(r=2)


def test_modes_are_kept_and_follow_the_model_later():
    model = Own()
    model.second.eval()
    inject(model, LoRAConfig(r=2, dropout=0.5, target_modules=["first", "second"], modules_to_save=["head"]))
    assert all(m.training for m in (model.first, model.first.lora_dropout, model.head.lora_copy))
    assert not any(m.training for m in (model.second, model.second.lora_dropout))
    assert not any(m.training for m in model.eval().modules())
    assert all(m.training for m in model.train().modules())


@pytest.mark.parametrize("made", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["4"]}, {"init": "pissa"}])
def test_other_weights_that_are_loaded_below_what_was_made_from_w0_are_warned_of(made):
    model = sequential()
    inject(model, LoRAConfig(r=2, target_modules=["0"], **made))
    model.load_state_dict(model.state_dict())
    with pytest.warns(AdapterWarning, match="load_state_dict put other weights below"):
        model.load_state_dict(sequential().state_dict(), strict=False)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True)], ids=str)
def test_a_norms_statistics_are_part_of_w0_in_train_mode_too(norm):
    model = nn.Sequential(nn.Conv1d(3, 3, 1), norm).train()
    model(torch.randn(4, 3, 9) + 1)
    before = norm.running_mean.clone()
    expected = model.eval()(torch.ones(4, 3, 9))
    inject(model.train(), LoRAConfig(r=1, target_modules=["0"]))
    assert torch.equal(model(torch.ones(4, 3, 9)), expected)
    assert torch.equal(norm.running_mean, before)
    assert norm.training, "modes are kept"


def test_hooks_are_kept_and_run_once():
    model, calls = Own(), []
    for module in (model.first, model.head):
        module.register_forward_hook(lambda module, args, out: calls.append(module))
        module.register_forward_pre_hook(lambda module, args: calls.append(module))
        module.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append(module))
    inject(model, LoRAConfig(r=2, target_modules=["first"], modules_to_save=["head"]))
    model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert calls == [model.first] * 2 + [model.head] * 3 + [model.first]
    merge(model)
    model(torch.randn(2, 8))
    assert len(calls) == 6 + 4, "also after a merge"


def test_a_second_injection_is_refused():
    model = sequential()
    inject(model, SMALL)
    before = snapshot(model)
    for adapted in (model, nn.ModuleList([model])):
        with pytest.raises(LoRAError, match="adapted already"):
            inject(adapted, SMALL)
    assert_same(model, before)


class Everything(nn.Module):
    """A layer of every kind."""

    def __init__(self):
        super().__init__()
        self.embed, self.tokens = nn.Embedding(9, 8), nn.Embedding(9, 8)
        self.conv, self.attention = nn.Conv1d(8, 8, 1), nn.MultiheadAttention(8, 2)
        self.matrix, self.up, self.head = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8), nn.Linear(8, 8)


OF_EVERYTHING = LoRAConfig(
    r=2,
    target_modules=["embed", "conv", "attention", "attention.out_proj", "up"],
    target_parameters=["matrix"],
    trainable_token_indices={"tokens": [1, 2]},
    modules_to_save=["head"],
    bias="all",
)


@pytest.mark.parametrize("kind", [LoRALinear, TokenRows, SavedCopy, TrainedBias, InjectionReport])
def test_every_kind_and_option_is_undone_where_an_injection_fails_half_way_or_at_its_end(monkeypatch, kind):
    """The tensors of the adapter are there in part only: the first of them was allocated, then memory ended."""

    def half(module, *args, **kwargs):
        if kind is not InjectionReport:
            graft(module, kind)
            module.lora_enabled = True
        if kind is LoRALinear:
            module.lora_A = nn.Parameter(torch.zeros(1))
        raise MemoryError

    model = Everything().train()
    model.up.weight.requires_grad_(False)
    before = snapshot(model)
    monkeypatch.setattr(kind, "of_model" if kind is InjectionReport else "attach", half)
    with pytest.raises(MemoryError):
        inject(model, OF_EVERYTHING)
    assert_same(model, before)
    monkeypatch.undo()
    inject(model, OF_EVERYTHING)
    assert_same(remove(model).requires_grad_(True), before, but=("trains",))


def test_a_module_in_two_places_is_adapted_once():
    plain = Own().double()
    model, x = copy.deepcopy(plain), torch.randn(4, 8).double()
    report = inject(model, LoRAConfig(r=2, target_modules=["again"]))
    assert [row.module for row in report.modules] == ["second"]
    assert report.trainable == 2 * (12 + 12)
    assert adapter_tensors(move(model)).keys() == {"second.lora_A", "second.lora_B"}
    assert frozen_keys(model) == plain.state_dict().keys()
    assert distance(model(x), folded(plain, model, {"second": 2.0})(x)) < 1e-12


def test_two_layers_with_one_weight_are_refused_by_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    before = snapshot(model)
    with pytest.raises(TargetError, match="'0' and '1' share one weight: adapt one of them, exclude the other"):
        inject(model, LoRAConfig(r=2, target_modules=["0", "1"]))
    assert_same(model, before)
    inject(model, LoRAConfig(r=2, target_modules=["0", "2"]))


def test_only_the_named_head_trains_and_not_what_ends_like_it_or_trained_before():
    model = Own()
    model.first.requires_grad_(False)
    model.head.weight.requires_grad_(False)
    report = inject(model, LoRAConfig(r=2, target_modules=["first"], modules_to_save=["head"]))
    assert report.saved == {"head": 12 * 3 + 3}
    assert [name for name, _ in modules_of_kind(model, SavedCopy)] == ["head"]
    trained = {"first.lora_A", "first.lora_B", "head.lora_copy.weight", "head.lora_copy.bias"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    remove(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_the_report_counts_what_trains_and_groups_blocks():
    model, fields = Own(), {"target_modules": ["first", "inner.a"], "modules_to_save": ["head"]}
    report = inject(model, LoRAConfig(r=2, alpha=3, rank_pattern={"a": 4}, **fields))
    rows = {row.module: (row.kind, row.r, row.alpha, row.parameters, row.why) for row in report.modules}
    assert rows == {"inner.a": ("Linear", 4, 3, 64, "inner.a"), "first": ("Linear", 2, 3, 40, "first")}
    assert report.trainable == 64 + 40 + 39 == json.loads(json.dumps(report.to_dict()))["trainable"]
    assert report.total == sum(p.numel() for p in model.parameters())
    assert f"trainable {report.trainable} of {report.total}" in str(report)
    blocks = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"query": nn.Linear(4, 4)}) for _ in range(3))})
    report = inject(blocks, LoRAConfig(r=2, target_modules=["query"]))
    assert report.table()[1:] == [("layers.*.query", "3", "Linear", "2", "4", f"{report.trainable}")]


def test_a_wrapper_that_hides_an_adapter_from_the_state_dict_is_refused_and_not_saved_empty():
    def rename(module, state, prefix, metadata):
        state["inner.lora_A"] = state.pop("0.lora_A")

    model = sequential()
    inject(model, LoRAConfig(r=2, target_modules=["0"]))
    model.register_state_dict_post_hook(rename)
    with pytest.raises(AdapterError, match="state_dict"):
        adapter_tensors(model)
