from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_lightning import LoRAConfig, LoRAError, inject, load_adapter, merge, remove, save_adapter
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.formats import tensor_files as storage
from lora_lightning.lora.formats.peft.config import CONFIG, WEIGHTS
from lora_lightning.lora.formats.peft.keys import PREFIX
from lora_lightning.lora.formats.peft.load import load_tensors
from lora_lightning.lora.formats.provenance import PROVENANCE
from lora_lightning.lora.formats.tensor_files import read_tensors, write_tensors
from lora_lightning.lora.frozen.tensors import adapter_tensors
from tests.factories import FAMILIES, HEADS, Own, assert_same, bert, distance, llama, move, output, sequential, snapshot

BERT = FAMILIES["bert"]
TOKENS = torch.arange(1, 7)[None]
RICH = {
    "r": 2,
    "alpha": 3.0,
    "target_modules": ["query", "value", "output.dense"],
    "rank_pattern": {"1.attention.self.query": 3, "value": 1},
    "alpha_pattern": {"value": 5.0, "0.output.dense": 0.7},
    "modules_to_save": ["classifier"],
}


def trained(family=BERT, dtype=torch.float32, **fields):
    model = family.build(dtype)
    inject(model, LoRAConfig(**{"r": 2, **fields}))
    return move(model)


def edit_config(directory, **fields):
    path = directory / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(directory, change, *, metadata=False):
    """Rewrite the weights, as PEFT would without our record unless `metadata` is kept."""
    tensors, kept = read_tensors(directory / WEIGHTS)
    change(tensors)
    write_tensors(directory / WEIGHTS, tensors, kept if metadata else {"format": "pt"})


# ---- round trips


@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_saved_is_what_is_loaded(family, dtype, tmp_path, rslora):
    model = trained(family, dtype, alpha=3, dropout=0.2, use_rslora=rslora, modules_to_save=[HEADS[family.name]])
    save_adapter(model, tmp_path)
    other = family.build(dtype)
    report = load_adapter(other, tmp_path)
    assert torch.equal(family.run(other, dtype), family.run(model, dtype))
    ours, theirs = adapter_tensors(model), adapter_tensors(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)
    # torch's attention reads its weights and does not call them: there is no input to drop from.
    is_read = {name for name, module in family.build().named_modules() if isinstance(module, nn.MultiheadAttention)}
    is_read |= {f"{name}.out_proj" for name in is_read}
    assert all(row.dropout == (0 if row.module in is_read else 0.2) for row in report.modules)
    assert [n for n, p in other.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("fields", [{}, RICH, {**RICH, "use_rslora": True}], ids=["plain", "rich", "rslora"])
def test_saving_twice_gives_identical_bytes_and_so_does_saving_what_was_loaded(tmp_path, fields):
    model = trained(**fields)
    other = BERT.build()
    for name in ("a", "b"):
        save_adapter(model, tmp_path / name)
    load_adapter(other, tmp_path / "a")
    save_adapter(other, tmp_path / "c")
    for file in (WEIGHTS, CONFIG):
        bytes_ = {(tmp_path / name / file).read_bytes() for name in "abc"}
        assert len(bytes_) == 1, file
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [CONFIG, WEIGHTS]


@settings(max_examples=8)
@given(
    st.permutations(list(RICH["rank_pattern"].items())),
    st.permutations(list(RICH["alpha_pattern"].items())),
    st.permutations(RICH["target_modules"]),
)
def test_the_order_of_patterns_does_not_reach_the_file(tmp_path_factory, ranks, alphas, targets):
    where = tmp_path_factory.mktemp("x")
    save_adapter(trained(**RICH), where / "a")
    fields = {**RICH, "rank_pattern": dict(ranks), "alpha_pattern": dict(alphas), "target_modules": targets}
    save_adapter(trained(**fields), where / "b")
    for file in (WEIGHTS, CONFIG):
        assert (where / "a" / file).read_bytes() == (where / "b" / file).read_bytes()


def test_a_head_of_several_layers_comes_back_as_one(tmp_path):
    def build():
        torch.manual_seed(4)
        head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        return nn.Sequential(nn.Linear(8, 8), head).eval()

    model, other = build(), build()
    nn.init.ones_(other[1][0].weight)  # a new head starts from other numbers
    inject(model, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    move(model).train()(torch.randn(9, 8))
    save_adapter(model.eval(), tmp_path)
    assert load_adapter(other, tmp_path).saved.keys() == {"1"}
    x = torch.randn(4, 8)
    assert torch.equal(other(x), model(x))
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == ["1"]


@pytest.mark.parametrize("targets", [["inner.a+b (c)"], ["inner.a", "first"], ["inner.a+b (c)", "inner.a", "second"]])
def test_names_with_regex_characters_survive(tmp_path, targets):
    model, other = Own(), Own()
    other.load_state_dict(model.state_dict())
    inject(model, LoRAConfig(r=1, target_modules=targets, rank_pattern={targets[0]: 3}, alpha_pattern={targets[0]: 7}))
    save_adapter(move(model), tmp_path)
    report = load_adapter(other, tmp_path)
    assert {row.module: row.r for row in report.modules} == {t: 3 if t == targets[0] else 1 for t in targets}
    x = torch.randn(2, 8)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("twin_head", [False, True])
def test_a_name_that_is_the_end_of_another_stays_alone(tmp_path, twin_head):
    def build():
        torch.manual_seed(4)
        model = nn.Sequential()
        model.fc, model.head = nn.Linear(4, 4), nn.Linear(4, 4)
        model.deep = nn.Sequential()
        model.deep.fc = nn.Linear(4, 4)
        if twin_head:
            model.deep.head = nn.Linear(4, 4)
        return model

    model, other = build(), build()
    fields = {"target_modules": "fc", "modules_to_save": ["head"], "r": 1}
    inject(model, LoRAConfig(**fields))
    save_adapter(move(model), tmp_path)
    report = load_adapter(other, tmp_path)
    assert [row.module for row in report.modules] == ["fc"]
    assert report.saved.keys() == {"head"}
    x = torch.randn(2, 4)
    assert torch.equal(other(x), model(x))
    if twin_head:  # PEFT wraps every head there is and cannot read a file with one
        return
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path)
    assert [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)] == [
        "base_model.model.fc"
    ]
    assert distance(theirs(x), model(x)) < 1e-6


def test_a_compiled_model_saves_the_same_bytes(tmp_path):
    model = trained(**RICH)
    save_adapter(model, tmp_path / "plain")
    save_adapter(torch.compile(model, backend="eager"), tmp_path / "compiled")
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "compiled" / file).read_bytes()


# ---- PEFT, both ways

PEFT_CONFIGS = {
    "list": {"target_modules": ["query", "value"]},
    "regex": {"target_modules": r".*layer\.1.*(key|output\.dense)"},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["query"], "use_rslora": True},
    "blocks": {"target_modules": ["query", "dense"], "layers_to_transform": [1]},
    "one block": {"target_modules": ["key"], "layers_to_transform": 0, "layers_pattern": "layer"},
    "exclude": {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]},
    "ranks": {"target_modules": ["query", "value", "key"], "rank_pattern": {"query": 1, r".*\.1\..*value": 3}},
    "alphas": {"target_modules": ["query", "value"], "alpha_pattern": {"query": 3, "0.attention.self.value": 7}},
    "dropout": {"target_modules": ["query"], "lora_dropout": 0.3},
    "r=1": {"target_modules": ["query"], "r": 1},
}


def from_peft(directory, **fields):
    """A PEFT model of tiny BERT, trained a little and saved."""
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 5, "task_type": "SEQ_CLS", **fields})
    model = peft.get_peft_model(BERT.build(), config).eval()
    move(model).save_pretrained(directory)
    return model


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_a_directory_of_pefts_loads_and_goes_back(tmp_path, name):
    theirs = from_peft(tmp_path / "theirs", **PEFT_CONFIGS[name])
    listed = json.loads((tmp_path / "theirs" / CONFIG).read_text())["modules_to_save"]
    assert set(listed) == {"classifier", "score"}  # PEFT lists both, the model has one
    ours = BERT.build()
    report = load_adapter(ours, tmp_path / "theirs")
    wanted = output(theirs, TOKENS)
    assert distance(output(ours, TOKENS), wanted) < 1e-6
    assert report.saved.keys() == {"classifier"}
    names = [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert [f"base_model.model.{row.module}" for row in report.modules] == names
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(BERT.build(), tmp_path / "ours").eval()
    assert distance(output(again, TOKENS), wanted) < 1e-6
    theirs_t, ours_t = (safetensors.torch.load_file(tmp_path / d / WEIGHTS) for d in ("theirs", "ours"))
    assert theirs_t.keys() == ours_t.keys()
    assert all(torch.equal(theirs_t[k], ours_t[k]) for k in theirs_t)
    merge(ours)
    assert distance(output(ours, TOKENS), wanted) < 1e-5
    assert distance(output(BERT.build(), TOKENS), wanted) > 1e-2


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_opens_what_is_saved(family, tmp_path, rslora):
    fields = {"r": 3, "alpha": 1.5}
    if family.name == "bert":
        fields = RICH
    elif family.name == "own":  # PEFT adapts only the first of two places
        fields = {**fields, "exclude_modules": ["second"]}
    elif family.name == "encoder":  # PEFT 0.21 counts an attention's out_proj twice
        fields = {**fields, "exclude_modules": ["out_proj"]}
    model = trained(family, **fields, use_rslora=rslora)
    save_adapter(model, tmp_path, task_type="SEQ_CLS" if family.name == "bert" else None)
    theirs = peft.PeftModel.from_pretrained(family.build(), tmp_path).eval()
    for module in theirs.modules():
        if isinstance(module, nn.TransformerEncoderLayer):  # PEFT lets the fused kernel pass its adapters by
            module.register_forward_pre_hook(lambda module, args: None)
    with torch.no_grad():
        assert distance(family.run(theirs), family.run(model)) < 1e-6


def test_peft_trains_on_what_is_saved_with_the_same_gradients(tmp_path):
    model = trained(**RICH)
    save_adapter(model, tmp_path, task_type="SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(BERT.build(), tmp_path, is_trainable=True).eval()
    for m in (model, theirs):
        output(m, TOKENS).square().sum().backward()
    found = dict(theirs.named_parameters())
    for name, tensor in adapter_tensors(model).items():
        module, _, last = name.rpartition(".")
        if last in ("lora_A", "lora_B"):
            twin = found[f"base_model.model.{module}.{last}.default.weight"]
            assert distance(tensor.grad, twin.grad) < 1e-4, name


def test_pefts_loose_heads_load_by_the_modules_that_the_file_holds(tmp_path):
    base, ours = Own(), Own()
    ours.load_state_dict(base.state_dict())
    config = peft.LoraConfig(r=2, target_modules=["first"], modules_to_save=["head"])  # wraps lm_head and overhead too
    theirs = move(peft.get_peft_model(base, config))
    theirs.save_pretrained(tmp_path)
    assert load_adapter(ours, tmp_path).saved.keys() == {"head", "overhead", "lm_head"}
    x = torch.randn(3, 8)
    assert distance(ours(x), theirs(x)) < 1e-6


def test_the_least_that_peft_loads_is_enough(tmp_path):
    model = trained(target_modules=["query"])
    save_adapter(model, tmp_path)
    edit_tensors(tmp_path, lambda tensors: None)
    least = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"]}
    (tmp_path / CONFIG).write_text(json.dumps(least))
    other = BERT.build()
    load_adapter(other, tmp_path)
    assert torch.equal(BERT.run(other), BERT.run(model))


def test_bf16_backbones_take_adapters_made_on_them_or_by_peft(tmp_path):
    model = trained(dtype=torch.bfloat16, **RICH)
    save_adapter(model, tmp_path / "bf16")
    other = BERT.build(torch.bfloat16)
    load_adapter(other, tmp_path / "bf16")
    assert torch.equal(BERT.run(other), BERT.run(model))
    from_peft(tmp_path / "peft", target_modules=["query"])
    other = BERT.build(torch.bfloat16)
    report = load_adapter(other, tmp_path / "peft")
    layer = other.get_submodule(report.modules[0].module)
    assert layer.lora_A.dtype == torch.float32
    stored = safetensors.torch.load_file(tmp_path / "peft" / WEIGHTS)
    assert torch.equal(layer.lora_A, stored[f"{PREFIX}{report.modules[0].module}.lora_A.weight"])


def test_an_adapter_of_float32_meets_a_bf16_backbone_only_when_asked(tmp_path):
    model = trained(**RICH)
    save_adapter(model, tmp_path)
    other = BERT.build(torch.bfloat16)
    before = snapshot(other)
    with pytest.raises(AdapterError, match="another base"):
        load_adapter(other, tmp_path)
    assert_same(other, before)
    load_adapter(other, tmp_path, allow_other_base=True)
    assert distance(BERT.run(other), BERT.run(model)) < 0.1


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("tied", [False, True])
def test_pefts_copy_of_an_output_layers_w0_is_checked_and_left(tmp_path, tied):
    base, ours, other = (llama(tie_word_embeddings=tied).eval() for _ in range(3))
    ours.load_state_dict(base.state_dict())
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    theirs = move(peft.get_peft_model(base, config))
    theirs.save_pretrained(tmp_path)
    assert f"{PREFIX}lm_head.base_layer.weight" in safetensors.torch.load_file(tmp_path / WEIGHTS)
    load_adapter(ours, tmp_path)
    assert distance(output(ours, TOKENS), output(theirs, TOKENS)) < 1e-6
    refused(tmp_path, "a weight of 'lm_head' that is not this model's", other)


# ---- refusals, each in one line, each leaving the model plain


def refused(directory, match, model=None, **options):
    model = BERT.build() if model is None else model
    before = snapshot(model)
    with pytest.raises(AdapterError, match=match) as caught:
        load_adapter(model, directory, **options)
    assert "\n" not in str(caught.value)
    assert_same(model, before)


def drop(tensors, part):
    name = next(n for n in tensors if part in n)
    del tensors[name]


CHANGES = {
    "missing B": (lambda t: drop(t, "lora_B"), "missing '.*lora_B.weight'"),
    "missing A": (lambda t: drop(t, "lora_A"), "has no tensors for|left over"),
    "missing module": (lambda t: [drop(t, "1.attention.self.value.lora") for _ in "AB"], "value' and .* no tensors"),
    "missing bias of head": (lambda t: drop(t, "classifier.bias"), r"missing '.*\.classifier\.bias'"),
    "missing head": (lambda t: [drop(t, "classifier") for _ in "wb"], "'classifier' in full and .* no tensors"),
    "surplus module": (
        lambda t: t.update(
            {
                f"{PREFIX}bert.encoder.layer.0.attention.self.key.lora_A.weight": torch.ones(2, 16),
                f"{PREFIX}bert.encoder.layer.0.attention.self.key.lora_B.weight": torch.ones(16, 2),
            }
        ),
        "left over tensors for 'bert.encoder.layer.0.attention.self.key'",
    ),
    "surplus in head": (
        lambda t: t.update({f"{PREFIX}classifier.scale": torch.ones(1)}),
        "left over '.*classifier.scale",
    ),
    "surplus base": (lambda t: t.update({f"{PREFIX}bert.pooler.dense.weight": torch.ones(16, 16)}), "left over"),
    "dora": (
        lambda t: t.update({f"{PREFIX}bert.encoder.layer.0.output.dense.lora_magnitude_vector": torch.ones(16)}),
        "left over.*magnitude",
    ),
    "unknown module": (
        lambda t: t.update({f"{PREFIX}bert.encoder.layer.7.attention.self.query.lora_A.weight": torch.ones(2, 16)}),
        "no module 'bert.encoder.layer.7.attention.self.query'.*did you mean",
    ),
    "no prefix": (lambda t: t.update({"classifier.weight": torch.ones(3, 16)}), "must start with"),
    "narrow A": (lambda t: t.update({n: x[:, :-1] for n, x in t.items() if "lora_A" in n}), "has shape .* expected"),
    "long A": (lambda t: t.update({n: x.repeat(9, 1) for n, x in t.items() if "lora_A" in n}), "larger than|shape"),
    "flat A": (lambda t: t.update({n: x.reshape(-1) for n, x in t.items() if "lora_A" in n}), "shape|larger"),
    "empty A": (lambda t: t.update({n: x[:0] for n, x in t.items() if "lora_A" in n}), "at least 1"),
    "scalar A": (lambda t: t.update({n: x.sum() for n, x in t.items() if "lora_A" in n}), "at least 1"),
    "short B": (lambda t: t.update({n: x[:-1] for n, x in t.items() if "lora_B" in n}), "has shape .* expected"),
    "small head": (lambda t: t.update({f"{PREFIX}classifier.weight": torch.ones(2, 16)}), "has shape .2, 16., exp"),
    "whole numbers": (lambda t: t.update({n: x.int() for n, x in t.items() if "lora_B" in n}), "int32, expected"),
    "nothing": (lambda t: t.clear(), "no tensors for"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_keys_and_shapes_that_do_not_fit_are_refused(tmp_path, change):
    save_adapter(trained(**RICH), tmp_path)
    edit_tensors(tmp_path, CHANGES[change][0])
    refused(tmp_path, CHANGES[change][1])
    refused(tmp_path, ".", allow_other_base=True)


def test_tensors_that_were_changed_under_our_own_record_are_refused(tmp_path):
    save_adapter(trained(**RICH), tmp_path)
    edit_tensors(tmp_path, lambda t: next(iter(t.values())).view(-1)[3:4].mul_(1 + 1e-6), metadata=True)
    refused(tmp_path, "was changed since it was saved", allow_other_base=True)


@pytest.mark.parametrize("change", ["layers_to_transform", "regex"])
def test_a_lost_module_is_missed_under_every_kind_of_selection(tmp_path, change):
    from_peft(tmp_path, **PEFT_CONFIGS["blocks" if change == "layers_to_transform" else "regex"])
    edit_tensors(tmp_path, lambda t: [drop(t, "layer.1.output.dense.lora") for _ in "AB"])
    refused(tmp_path, "adapts 'bert.encoder.layer.1.output.dense' and .* no tensors")


SETTINGS = [
    *[{"use_dora": 1}, {"bias": "some"}, {"lora_bias": "yes"}, {"fan_in_fan_out": "no"}],
    *[{"trainable_token_indices": [1]}, {"target_parameters": ["x"]}, {"layer_replication": [[0, 2]]}],
    *[{"alora_invocation_tokens": [1]}, {"use_qalora": True}, {"peft_type": "IA3"}, {"peft_type": None}],
    *[{"r": "8"}, {"r": 2.5}, {"lora_alpha": "16"}, {"lora_alpha": True}, {"lora_dropout": [0]}],
    *[{"use_rslora": "false"}, {"target_modules": 5}, {"target_modules": ["query", 1]}, {"target_modules": "(query"}],
    *[{"exclude_modules": {}}, {"exclude_modules": "*"}, {"modules_to_save": "classifier"}, {"layers_pattern": 3}],
    *[{"alpha_pattern": {"(": 1}}, {"alpha_pattern": [1]}, {"alpha_pattern": {"query": "2"}}, {"rank_pattern": "q"}],
    *[{"layers_to_transform": "0"}, {"layers_to_transform": [0.5]}],
]
MEANINGS = [
    ({"lora_alpha": 0}, "alpha must be a finite number above 0, got 0"),
    ({"alpha_pattern": {".*query": 0}}, "alpha_pattern.* must be a finite number above 0"),
    ({"lora_dropout": 1.5}, "dropout must be at least 0 and below 1, got 1.5"),
    ({"target_modules": ["key"]}, "adapts '.*key' and|left over tensors for"),
    ({"exclude_modules": ["query"]}, "left over tensors for 'bert.encoder.layer.0.attention.self.query'"),
    ({"target_modules": ["query"]}, "left over tensors for 'bert.encoder.layer.0.attention.self.value'"),
    ({"use_dora": True}, "missing '.*query.lora_magnitude_vector'"),
    ({"lora_bias": True}, "missing '.*query.lora_B.bias'"),
    ({"bias": "all"}, "missing '.*LayerNorm.bias'"),
    ({"bias": "lora_only"}, "missing '.*query.base_layer.bias'"),
    ({"modules_to_save": None}, "2 keys.: left over classifier.*none"),
    ({"modules_to_save": ["classifier", "pooler"]}, "saves 'bert.pooler' in full and .* no tensors"),
]


@pytest.mark.parametrize(
    ("setting", "match"), [*((s, next(iter(s))) for s in SETTINGS), *MEANINGS], ids=lambda value: str(value)[:40]
)
def test_settings_without_a_counterpart_or_a_meaning_are_refused(tmp_path, setting, match):
    save_adapter(trained(**RICH), tmp_path)
    edit_tensors(tmp_path, lambda t: None)  # as PEFT writes it, without our record
    edit_config(tmp_path, **setting)
    refused(tmp_path, match)


@pytest.mark.parametrize(
    "setting",
    [{"lora_alpha": 6}, {"alpha_pattern": {}}, {"use_rslora": True}, {"alpha_pattern": None}],
    ids=str,
)
def test_settings_that_were_changed_under_our_own_record_are_refused(tmp_path, setting):
    save_adapter(trained(**RICH), tmp_path)
    edit_config(tmp_path, **setting)
    refused(tmp_path, "was changed since it was saved")


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "alpha_pattern"])
@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("a(", r"is not a regular expression \(missing \)"),
        ("q)|(v", r"is not a regular expression \(unbalanced"),
    ],
    ids=["torn", "torn inside PEFT's group"],
)
def test_a_regular_expression_is_refused_with_the_reason(tmp_path, field, pattern, reason):
    save_adapter(trained(**RICH), tmp_path)
    edit_config(tmp_path, **{field: {"fine": 3, pattern: 3} if field == "alpha_pattern" else pattern})
    refused(tmp_path, f"{field} must be .* regular expression.* {reason}")


CHANGED = {
    "a token's number": {"trainable_token_indices": {"bert.embeddings.word_embeddings": [1, 7]}},
    "the dropout": {"lora_dropout": 0.9},
    "a field that was not there": {"layers_to_transform": [0]},
    "a field that is not there any more": {"lora_dropout": None},
    "a flag": {"fan_in_fan_out": True},
    "the start": {"init_lora_weights": "pissa"},
    "a tie": {"ensure_weight_tying": True},
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_config_of_ours_that_says_another_thing_is_refused_by_the_field(tmp_path, change):
    options = {"dropout": 0.1, "trainable_token_indices": {"word_embeddings": [1, 5]}}
    save_adapter(trained(target_modules=["query"], **options), tmp_path)
    edit_config(tmp_path, **CHANGED[change])
    (field,) = CHANGED[change]
    refused(tmp_path, rf"was changed since it was saved, in {field}=.*base_model_name_or_path.* may be changed")


def test_a_config_of_ours_may_be_edited_where_it_changes_nothing_of_the_update(tmp_path):
    model = trained(target_modules=["query"], alpha=4)
    save_adapter(model, tmp_path)
    edit_config(tmp_path, base_model_name_or_path="other/name", revision="main", inference_mode=False)
    edit_config(tmp_path, task_type="SEQ_CLS", auto_mapping=None, lora_alpha=4.0, exclude_modules=None, lora_bias=None)
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["use_dora"]
    (tmp_path / CONFIG).write_text(json.dumps(dict(reversed(config.items()))))
    other = BERT.build()
    load_adapter(other, tmp_path)
    assert torch.equal(BERT.run(other), BERT.run(model))


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "one byte less", "binary"])
def test_files_that_are_missing_or_torn_are_refused(tmp_path, file, damage):
    save_adapter(trained(**RICH), tmp_path)
    path = tmp_path / file
    data = path.read_bytes()
    cut = {"empty": b"", "half": data[: len(data) // 2], "one byte less": data[:-2], "binary": b"\xff\xfe\0" * 9}
    path.unlink()
    if damage != "missing":
        path.write_bytes(cut[damage])
    refused(tmp_path, re.escape(file))
    refused(tmp_path / "nowhere", "no folder")


def test_an_adapter_made_on_another_base_is_refused_by_the_names_that_differ(tmp_path):
    save_adapter(trained(**RICH), tmp_path)
    other = BERT.build()
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.bias[0] += 1e-6
    refused(
        tmp_path, r"another base: W0 \w{12} there.* 1 of \d+ tensors differ, first bert.encoder.layer.1.output", other
    )
    load_adapter(other, tmp_path, allow_other_base=True)
    assert other.get_parameter("bert.encoder.layer.1.attention.self.query.lora_B").any()


def test_a_base_that_was_merged_into_is_another_base(tmp_path):
    model = trained(**RICH)
    save_adapter(model, tmp_path)
    merge(model)
    refused(tmp_path, "another base", model)


@pytest.mark.parametrize("record", ["", "{}", "[1]", '{"base": 3}', '{"base": {"digest": "a", "tensors": 5}}', "null"])
def test_a_record_that_cannot_be_read_is_refused(tmp_path, record):
    save_adapter(trained(**RICH), tmp_path)
    tensors, metadata = read_tensors(tmp_path / WEIGHTS)
    write_tensors(tmp_path / WEIGHTS, tensors, {**metadata, PROVENANCE: record})
    refused(tmp_path, "record of its base cannot be read")


def test_a_model_on_the_meta_device_is_refused_before_it_drops_what_is_loaded(tmp_path):
    save_adapter(trained(**RICH), tmp_path)
    with torch.device("meta"):
        model = bert()
    for allow in (False, True):
        with pytest.raises(AdapterError, match="meta device"):
            load_adapter(model, tmp_path, allow_other_base=allow)
    assert not [m for m in model.modules() if hasattr(m, "lora_A")]


def test_a_second_load_is_refused_and_changes_nothing(tmp_path):
    model = trained(**RICH)
    save_adapter(model, tmp_path)
    before = snapshot(model)
    with pytest.raises(LoRAError, match="adapted already"):
        load_adapter(model, tmp_path)
    assert_same(model, before)


def test_a_failed_load_keeps_what_trained_before(tmp_path):
    save_adapter(trained(**RICH), tmp_path)
    edit_tensors(tmp_path, lambda t: drop(t, "lora_B"))
    model = BERT.build()
    model.bert.embeddings.requires_grad_(False)
    refused(tmp_path, "missing", model)  # compares requires_grad too


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="no adapter"):
        save_adapter(sequential(), tmp_path)
    model = trained()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("lora_B"))[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"lora_B.* is not finite"):
        save_adapter(model, tmp_path)
    layer = nn.Linear(4, 4)
    inject(layer, LoRAConfig(r=1))
    with pytest.raises(AdapterError, match="has no name: wrap it"):
        save_adapter(layer, tmp_path)
    assert list(tmp_path.iterdir()) == []


class FullDisk:
    """Room for so many files, then none."""

    def __init__(self, files):
        self.left, self.sync = files, os.fsync

    def __call__(self, number):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.sync(number)


@pytest.mark.parametrize("files", [0, 1])
def test_a_save_that_finds_no_room_leaves_the_old_adapter_whole(tmp_path, monkeypatch, files):
    save_adapter(trained(alpha=3), tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    for directory in ("old", "new"):
        monkeypatch.setattr(storage.os, "fsync", FullDisk(files))
        with pytest.raises(AdapterError, match=rf"{directory}' cannot be written .*No space left.* is as it was"):
            save_adapter(trained(alpha=5), tmp_path / directory)
        monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_save_with_something_in_the_way_is_one_clear_error(tmp_path, name):
    (tmp_path / "in" / name / "the way").mkdir(parents=True)
    with pytest.raises(AdapterError, match=r"in' cannot be written .*is a directory"):
        save_adapter(trained(), tmp_path / "in")
    assert [path.name for path in (tmp_path / "in").iterdir()] == [name]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterError, match=r"file' cannot be written .*expected a directory"):
        save_adapter(trained(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_compiled_model_saves_and_loads_as_the_one_inside(tmp_path):
    family = FAMILIES["sequential"]
    model, other = trained(family), family.build()
    save_adapter(torch.compile(model, backend="eager"), tmp_path)
    compiled = torch.compile(other, backend="eager")
    base = family.run(compiled)  # a graph of the plain model is there
    load_adapter(compiled, tmp_path)
    assert torch.equal(family.run(other), family.run(model))
    assert distance(family.run(compiled), family.run(model)) < 1e-6 < distance(base, family.run(model))


def test_a_model_on_the_meta_device_is_not_saved(tmp_path):
    with torch.device("meta"):
        model = sequential()
    inject(model, LoRAConfig(r=2))
    with pytest.raises(AdapterError, match="meta device and has no values to save: give it its weights"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_load_tensors_loads_all_or_nothing():
    model = trained()
    before = {k: v.detach().clone() for k, v in adapter_tensors(model).items()}
    other = {k: v + 1 for k, v in before.items()}
    first = next(iter(other))
    for wrong in (
        {k: v for k, v in other.items() if k != first},
        {**other, "surplus": torch.ones(1)},
        {**other, first: other[first][:1]},
    ):
        with pytest.raises(AdapterError, match=r"does not fit this model \(1 keys\)"):
            load_tensors(model, wrong)
        assert all(torch.equal(v, before[k]) for k, v in adapter_tensors(model).items())
    load_tensors(model, other)
    assert all(torch.equal(v, other[k]) for k, v in adapter_tensors(model).items())


def test_tied_embeddings_save_no_base_matrix_and_load(tmp_path):
    model, other = llama(tie_word_embeddings=True), llama(tie_word_embeddings=True)
    other.load_state_dict(model.state_dict())
    inject(model, LoRAConfig(r=2, target_modules=["lm_head", "q_proj"]))
    save_adapter(move(model), tmp_path)
    assert all("lora_" in key for key in safetensors.torch.load_file(tmp_path / WEIGHTS))
    load_adapter(other, tmp_path)
    assert torch.equal(output(other, TOKENS), output(model, TOKENS))


# ---- fuzz


def mutate(data: bytes, random_: random.Random) -> bytes:
    """One accident: a flipped bit, a changed, lost, doubled or swapped stretch, a cut, or digits that differ."""
    kind, at = random_.randrange(6), random_.randrange(len(data))
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << random_.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + bytes([random_.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + data[at + random_.randrange(1, 9) :]
    if kind == 3:
        return data[:at] + data[at : at + 8] + data[at:]
    if kind == 4:
        return data[:at]
    digits = [m.start() for m in re.finditer(rb"[0-9]", data[:8192])] or [at]
    at = random_.choice(digits)
    return data[:at] + str(random_.randrange(10)).encode() + data[at + 1 :]


@pytest.mark.parametrize("origin", ["ours", "peft"])
@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_no_mutation_of_a_file_loads_quietly_as_something_else(tmp_path, origin, file):
    if origin == "ours":
        save_adapter(trained(**RICH), tmp_path / "good")
    else:
        from_peft(tmp_path / "good", **PEFT_CONFIGS["ranks"])
    model = BERT.build()
    load_adapter(model, tmp_path / "good")
    wanted = {k: v.detach().clone() for k, v in adapter_tensors(model).items()}
    computed_with = {n: m.lora_settings for n, m in model.named_modules() if hasattr(m, "lora_settings")}
    out = BERT.run(model)
    remove(model).requires_grad_(True)
    before = snapshot(model)
    good = (tmp_path / "good" / file).read_bytes()
    outcomes = {"refused": 0, "same": 0, "other": 0}
    random_ = random.Random(7)
    for at in range(100):
        bad = tmp_path / f"bad{at}"
        shutil.copytree(tmp_path / "good", bad)
        data = mutate(good, random_)
        (bad / file).write_bytes(data)
        try:
            load_adapter(model, bad)
        except AdapterError:
            outcomes["refused"] += 1
            assert_same(model, before)
            continue
        now = {n: m.lora_settings for n, m in model.named_modules() if hasattr(m, "lora_settings")}
        same = now == computed_with and torch.equal(BERT.run(model), out)
        same = same and all(torch.equal(v, wanted[k]) for k, v in adapter_tensors(model).items())
        outcomes["same" if same else "other"] += 1
        if origin == "ours":
            assert same, f"mutation {at}: {set(good.splitlines()) ^ set(data.splitlines())}"
        remove(model).requires_grad_(True)
    assert sum(outcomes.values()) == 100
    # A file of PEFT's own carries no digest: other values can pass there, never another exception or a torn model.
    assert outcomes["refused"] > 20
