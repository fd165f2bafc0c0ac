from __future__ import annotations

import copy
import io
import json
import pickle
import sys

import peft
import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from lora_lightning import LoRAConfig, LoRAError, disabled, inject, remove
from lora_lightning.lora.errors import AdapterError, TargetError
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.frozen.tensors import adapter_tensors, base_tensors, frozen_keys
from lora_lightning.lora.inject import adapted_layers, grafted_modules
from lora_lightning.lora.layers import LoRALinear, SavedCopy, TokenRows, TrainedBias, graft
from lora_lightning.lora.report import InjectionReport
from tests.factories import Own, assert_same, distance, folded, move, output, sequential, snapshot

HEADS = {
    "sequential": "4",
    "own": "head",
    "encoder": "layers.1.norm2",
    "bert": "classifier",
    "llama": "lm_head",
    "gpt": "lm_head",
}
SMALL = LoRAConfig(r=2)


@pytest.mark.parametrize("training", [False, True])
def test_fresh_adapter_changes_nothing(family, dtype, tolerance, training):
    # nn.MultiheadAttention takes another kernel where gradients are wanted, so both are asked for without.
    model = family.build(dtype).train(training).requires_grad_(False)
    with torch.no_grad():
        torch.manual_seed(5)
        before = family.run(model, dtype)
        inject(model, SMALL)
        torch.manual_seed(5)  # the backbone's own dropout draws the same numbers
        assert torch.equal(family.run(model, dtype), before)
    torch.manual_seed(5)
    after = family.run(model, dtype)
    assert after.requires_grad
    assert torch.equal(after, before) or (family.name == "encoder" and distance(after, before) < tolerance)


def test_fresh_copy_of_a_head_changes_nothing(family):
    model = family.build().requires_grad_(False)
    with torch.no_grad():
        before = family.run(model)
        inject(model, LoRAConfig(r=2, modules_to_save=[HEADS[family.name]]))
        assert torch.equal(family.run(model), before)
        assert not torch.equal(family.run(move(model)), before)


@pytest.mark.parametrize("rslora", [False, True])
def test_adapted_output_is_the_formula(family, rslora):
    plain, model = family.build(torch.float64), family.build(torch.float64)
    report = inject(model, LoRAConfig(r=3, alpha=5.0, use_rslora=rslora))
    move(model)
    s = 5.0 / (3**0.5 if rslora else 3)
    reference = folded(plain, model, {row.module: s for row in report.modules})
    got = family.run(model, torch.float64)
    assert distance(got, family.run(reference, torch.float64)) < 1e-12
    assert distance(got, family.run(plain, torch.float64)) > 1e-3


def test_w0_never_moves(family, dtype):
    model = family.build(dtype).train()
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    inject(model, LoRAConfig(r=2, dropout=0.1, modules_to_save=[HEADS[family.name]]))
    before = fingerprint(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        family.run(model, dtype).float().square().mean().backward()
        optimizer.step()
    assert fingerprint(model) == before
    state = model.state_dict()
    for key, value in plain.items():
        assert torch.equal(state[key], value), key
    assert all(tensor.any() for key, tensor in adapter_tensors(model).items() if key.endswith("lora_B"))


def test_original_names_survive(family):
    plain, model = family.build(), family.build()
    ids = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    modules = {n: (m, type(m)) for n, m in model.named_modules(remove_duplicate=False)}
    inject(model, SMALL)
    assert plain.state_dict().keys() == frozen_keys(model)
    assert plain.state_dict().keys() == base_tensors(model).keys()
    now = dict(model.named_parameters(remove_duplicate=False))
    assert {n: id(now[n]) for n in ids} == ids
    for name, (module, cls) in modules.items():
        assert model.get_submodule(name) is module
        assert isinstance(module, cls)


def test_only_a_and_b_train_and_each_gets_a_finite_gradient(family, dtype):
    model = family.build(dtype)
    report = inject(model, SMALL)
    move(model)
    family.run(model, dtype).float().square().mean().backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == adapter_tensors(model).keys()
    assert trained == {f"{row.module}.lora_{x}" for row in report.modules for x in "AB"}
    for name, parameter in model.named_parameters():
        if name in trained:
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


def test_remove_gives_the_very_model_back(family):
    model = family.build()
    model.requires_grad_(False)
    before, out = snapshot(model), family.run(model)
    inject(model, LoRAConfig(r=2, dropout=0.1, modules_to_save=[HEADS[family.name]]))
    move(model)
    with disabled(model):
        pass
    assert remove(model) is model
    assert_same(model, before)
    assert torch.equal(family.run(model), out)
    inject(model, SMALL)


def test_disabled_is_the_backbone_and_the_adapter_comes_back(family):
    model = family.build()
    with torch.no_grad():
        before = family.run(model)
        inject(model, LoRAConfig(r=2, modules_to_save=[HEADS[family.name]]))
        adapted = family.run(move(model))
        with disabled(model):
            with disabled(model):
                assert torch.equal(family.run(model), before)
            assert torch.equal(family.run(model), before)
        with pytest.raises(KeyError), disabled(model):
            raise KeyError
        assert torch.equal(family.run(model), adapted)
    assert not torch.equal(adapted, before)


def test_modes_are_kept_and_follow_the_model_later():
    model = Own()
    model.second.eval()
    inject(model, LoRAConfig(r=2, dropout=0.5, target_modules=["first", "second"], modules_to_save=["head"]))
    assert model.first.training
    assert model.first.lora_dropout.training
    assert model.head.lora_copy.training
    assert not model.second.training
    assert not model.second.lora_dropout.training
    assert not any(m.training for m in model.eval().modules())
    assert all(m.training for m in model.train().modules())


def test_hooks_are_kept_and_run_once():
    model, calls = Own(), []
    for module in (model.first, model.head):
        module.register_forward_hook(lambda module, args, out: calls.append(module))
        module.register_forward_pre_hook(lambda module, args: calls.append(module))
        module.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append(module))
    inject(model, LoRAConfig(r=2, target_modules=["first"], modules_to_save=["head"]))
    model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert calls == [model.first] * 2 + [model.head] * 3 + [model.first]


def test_a_second_injection_is_refused():
    model = sequential()
    inject(model, SMALL)
    before = snapshot(model)
    with pytest.raises(LoRAError, match="adapted already"):
        inject(model, SMALL)
    with pytest.raises(LoRAError, match="adapted already"):
        inject(nn.ModuleList([model]), SMALL)
    assert_same(model, before)


def test_another_librarys_adapters_are_refused():
    model = peft.get_peft_model(sequential(), peft.LoraConfig(target_modules=["0"], r=2))
    with pytest.raises(LoRAError, match="another library"):
        inject(model, SMALL)


def test_what_is_no_module_is_refused():
    with pytest.raises(LoRAError, match="Module, got dict"):
        inject({}, SMALL)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["first", "secnod"]},
        {"target_modules": ["first"], "modules_to_save": ["haed"]},
        {"target_modules": ["first", "norm"]},
        {"target_modules": ["first"], "r": 9},
        {"rank_pattern": {"nowhere": 2}},
        {"layers_to_transform": 7},
    ],
    ids=str,
)
def test_a_refused_injection_leaves_the_model_as_it_was(fields):
    model = Own()
    model.second.weight.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(TargetError):
        inject(model, LoRAConfig(**fields))
    assert_same(model, before)


def test_an_injection_that_fails_half_way_leaves_the_model_as_it_was():
    model = Own()
    model.head.cache = (model.head.weight * 2).requires_grad_()  # torch cannot deepcopy it
    model.second.weight.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="deepcopy"):
        inject(model, LoRAConfig(r=2, target_modules=["first"], modules_to_save=["overhead", "head"]))
    assert_same(model, before)


class Everything(nn.Module):
    """A layer of every kind."""

    def __init__(self):
        super().__init__()
        self.embed, self.tokens = nn.Embedding(9, 8), nn.Embedding(9, 8)
        self.conv, self.attention = nn.Conv1d(8, 8, 1), nn.MultiheadAttention(8, 2)
        self.matrix, self.up, self.head = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8), nn.Linear(8, 8)


def test_every_kind_and_option_is_undone_where_an_injection_fails_at_its_end(monkeypatch):
    def fail(*args):
        report(*args)
        raise MemoryError

    report = InjectionReport.of_model
    monkeypatch.setattr(InjectionReport, "of_model", fail)
    model = Everything().train()
    model.up.weight.requires_grad_(False)
    before = snapshot(model)
    targets = {"target_modules": ["embed", "conv", "attention", "attention.out_proj", "up"]}
    others = {"target_parameters": ["matrix"], "trainable_token_indices": {"tokens": [1, 2]}}
    with pytest.raises(MemoryError):
        inject(model, LoRAConfig(r=2, **targets, **others, modules_to_save=["head"], bias="all"))
    assert_same(model, before)
    monkeypatch.undo()
    inject(model, LoRAConfig(r=2, **targets, **others, modules_to_save=["head"], bias="all"))
    assert_same(remove(model).requires_grad_(True), before, but=("trains",))


@pytest.mark.parametrize("kind", [LoRALinear, TokenRows, SavedCopy, TrainedBias])
def test_every_kind_is_undone_where_its_own_part_fails_half_way(monkeypatch, kind):
    """The tensors of the adapter are there in part only: the first of them was allocated, then memory ended."""
    model = Everything()
    before = snapshot(model)

    def half(module, *args, **kwargs):
        graft(module, kind)
        module.lora_enabled = True
        if kind is LoRALinear:
            module.lora_A = nn.Parameter(torch.zeros(1))
        raise MemoryError

    monkeypatch.setattr(kind, "attach", half)
    fields = {"trainable_token_indices": {"tokens": [1]}, "modules_to_save": ["head"], "bias": "all"}
    with pytest.raises(MemoryError):
        inject(model, LoRAConfig(r=2, target_modules=["conv", "up"], **fields))
    assert_same(model, before)


def test_a_module_in_two_places_is_adapted_once():
    plain, model = Own().double(), Own().double()
    model.load_state_dict(plain.state_dict())
    report = inject(model, LoRAConfig(r=2, target_modules=["again"]))
    assert [row.module for row in report.modules] == ["second"]
    assert report.trainable == 2 * (12 + 12)
    assert len(adapted_layers(model)) == 1
    assert adapter_tensors(move(model)).keys() == {"second.lora_A", "second.lora_B"}
    assert frozen_keys(model) == plain.state_dict().keys()
    x = torch.randn(4, 8, dtype=torch.float64)
    assert distance(model(x), folded(plain, model, {"second": 2.0})(x)) < 1e-12


def test_two_layers_with_one_weight_are_refused_by_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    before = snapshot(model)
    with pytest.raises(TargetError, match="'0' and '1' share one weight"):
        inject(model, LoRAConfig(r=2, target_modules=["0", "1"]))
    assert_same(model, before)
    inject(model, LoRAConfig(r=2, target_modules=["0", "2"]))


def test_only_the_named_head_trains_and_not_what_ends_like_it():
    model = Own()
    report = inject(model, LoRAConfig(r=2, target_modules=["first"], modules_to_save=["head"]))
    assert report.saved == {"head": 12 * 3 + 3}
    assert [name for name, _ in grafted_modules(model, SavedCopy)] == ["head"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        *("first.lora_A", "first.lora_B", "head.lora_copy.weight", "head.lora_copy.bias")
    }


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_a_copied_model_is_equal_and_apart(family, copier):
    model = family.build()
    inject(model, LoRAConfig(r=2, dropout=0.1, modules_to_save=[HEADS[family.name]]))
    move(model)
    if copier == "deepcopy":
        twin = copy.deepcopy(model)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert [(n, type(m)) for n, m in twin.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    before = family.run(model)
    assert torch.equal(family.run(twin), before)
    move(twin)
    assert not torch.equal(family.run(twin), before)
    remove(twin)
    assert torch.equal(family.run(model), before)
    assert twin.state_dict().keys() == frozen_keys(model)


def test_a_state_dict_resumes_in_a_freshly_injected_model(family):
    model, other = family.build(), family.build()
    inject(model, SMALL)
    inject(other, SMALL)
    other.load_state_dict(move(model).state_dict(), strict=True)
    assert torch.equal(family.run(other), family.run(model))


def test_injection_on_the_meta_device_allocates_nothing_and_starts_when_filled(family):
    with torch.device("meta"):
        model = family.make()
    report = inject(model, LoRAConfig(r=2, dropout=0.1))
    assert all(p.is_meta for p in model.parameters())
    assert report.trainable == sum(p.numel() for p in adapter_tensors(model).values())
    model.to_empty(device="cpu")
    for module in model.modules():
        if "reset_parameters" in dir(module):
            module.reset_parameters()
    for _, layer in adapted_layers(model):
        assert layer.lora_A.any()
        assert layer.lora_A.isfinite().all()
        assert not layer.lora_B.any()


@pytest.mark.skipif(sys.version_info >= (3, 15), reason="torch.compile follows new Pythons late")
def test_a_compiled_model_computes_the_same():
    model = sequential()
    inject(model, LoRAConfig(r=2, modules_to_save=["4"]))
    move(model)
    x = torch.randn(3, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    grads = torch.autograd.grad(compiled(x).square().sum(), model[0].lora_A)
    torch.testing.assert_close(grads, torch.autograd.grad(model(x).square().sum(), model[0].lora_A))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (8,)])
def test_empty_and_single_inputs_pass(shape):
    model = Own()
    inject(model, LoRAConfig(r=1, modules_to_save=["head"]))
    out = move(model)(torch.zeros(shape))
    assert out.shape == (*shape[:-1], 3)
    out.sum().backward()
    assert model.first.lora_A.grad is not None


def test_a_mixture_of_frozen_and_trained_becomes_adapters_only():
    model = Own()
    model.first.requires_grad_(False)
    model.head.weight.requires_grad_(False)
    inject(model, LoRAConfig(r=2, target_modules=["first"], modules_to_save=["head"]))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"first.lora_A", "first.lora_B", "head.lora_copy.weight", "head.lora_copy.bias"}
    remove(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_head_of_several_layers_and_buffers_trains_in_full():
    head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": head})
    model.forward = lambda x: model["head"](model["body"](x))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    inject(model, LoRAConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    model.forward(torch.randn(9, 8)).sum().backward()
    own = {k: v for k, v in model.state_dict().items() if k in before}
    assert all(torch.equal(own[k], before[k]) for k in before)
    assert int(head.lora_copy[1].num_batches_tracked) == 1
    assert head.lora_copy[0].weight.grad is not None


def test_the_report_counts_what_trains():
    model = Own()
    report = inject(
        model,
        LoRAConfig(r=2, alpha=3, target_modules=["first", "inner.a"], rank_pattern={"a": 4}, modules_to_save=["head"]),
    )
    rows = {row.module: (row.kind, row.r, row.alpha, row.parameters, row.why) for row in report.modules}
    assert rows == {
        "inner.a": ("Linear", 4, 3, 4 * 16, "inner.a"),
        "first": ("Linear", 2, 3, 2 * 20, "first"),
    }
    assert report.trainable == 4 * 16 + 2 * 20 + 39
    assert report.total == sum(p.numel() for p in model.parameters())
    assert report.share == pytest.approx(report.trainable / report.total)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["trainable"] == report.trainable
    assert f"trainable {report.trainable} of {report.total}" in str(report)
    assert all(part in str(report) for part in ("inner.a", "first", "in full"))


def test_the_report_groups_blocks(family):
    model = family.build()
    report = inject(model, SMALL)
    assert sum(count for _, count, _, _ in report.groups()) == len(report.modules)
    assert sum(parameters for *_, parameters in report.groups()) == report.trainable
    if family.name == "bert":
        names = {name: count for name, count, _, _ in report.groups()}
        assert names["bert.encoder.layer.*.attention.self.query"] == 2


def test_a_wrapper_that_hides_an_adapter_from_the_state_dict_is_refused_and_not_saved_empty():
    model = sequential()
    inject(model, LoRAConfig(r=2, target_modules=["0"]))

    def rename(module, state, prefix, metadata):
        state["inner.lora_A"] = state.pop("0.lora_A")

    model.register_state_dict_post_hook(rename)
    with pytest.raises(AdapterError, match="state_dict"):
        adapter_tensors(model)


def test_reentrant_free_checkpointing_gives_every_adapter_its_gradient():
    model = sequential()
    inject(model, SMALL)
    move(model)
    x = torch.randn(3, 8)
    output(model, x).sum().backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    got = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


def test_instance_norms_statistics_are_part_of_w0():
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.InstanceNorm1d(3, track_running_stats=True)).train()
    model(torch.randn(4, 3, 9) + 1)
    before = model[1].running_mean.clone()
    expected = model.eval()(torch.ones(4, 3, 9))
    inject(model.train(), LoRAConfig(r=1, target_modules=["0"]))
    assert torch.equal(model(torch.ones(4, 3, 9)), expected)
    assert torch.equal(model[1].running_mean, before)
