"""Law 7: what is saved is what is loaded, by us and by PEFT, and what does not fit is refused with the model as it was.

Families and options are in test_travel.py, accidents by the thousand in test_fuzz.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

from lora_lightning import LoRAConfig, LoRAError, inject, load_adapter, merge, save_adapter
from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.formats.peft.config import CONFIG, WEIGHTS
from lora_lightning.lora.formats.peft.keys import PREFIX
from lora_lightning.lora.formats.provenance import PROVENANCE
from lora_lightning.lora.formats.tensor_files import read_tensors, write_tensors
from lora_lightning.lora.frozen.tensors import adapter_tensors
from tests.command.process import REPOSITORY
from tests.factories import FAMILIES, Own, bert, distance, move, output, sequential
from tests.lora import directories
from tests.lora.directories import edit_config, edit_tensors, same_files

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


def from_peft(directory, **fields):
    return directories.of_peft(directory, BERT.build(), **{"task_type": "SEQ_CLS", **fields})


def refused(directory, match, model=None, **options):
    if model is None:
        model = BERT.build()
        model.bert.embeddings.requires_grad_(False)  # what trained before does so afterwards, and no more
    directories.refused(directory, match, model, **options)


# ---- round trips


PISSA = {"init": "pissa", "use_rslora": True, "alpha": 7, "target_modules": ["key", "query"]}


@pytest.mark.parametrize(
    "fields",
    [{}, {**RICH, "use_rslora": True}, {**PISSA, "r": 4, "rank_pattern": {"key": 1, "1.attention.self.query": 7}}],
    ids=["plain", "rich", "subtracted"],
)
def test_the_same_adapter_is_the_same_bytes(tmp_path, fields):
    """Saved twice, after loading, from a compiled model, and whatever the order of the patterns."""
    model, other = trained(**fields), BERT.build()
    turned = {k: dict(reversed(v.items())) if isinstance(v, dict) else v for k, v in fields.items()}
    turned |= {"target_modules": fields["target_modules"][::-1]} if fields else {}
    for name in ("a", "b"):
        save_adapter(model, tmp_path / name)
    load_adapter(other, tmp_path / "a")
    save_adapter(other, tmp_path / "c")
    save_adapter(torch.compile(model, backend="eager"), tmp_path / "d")
    save_adapter(trained(**turned), tmp_path / "e")
    assert same_files(*(tmp_path / name for name in "abcde"))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [CONFIG, WEIGHTS]


def write_rich(directory):
    torch.manual_seed(1)
    model = Own()
    model.table = nn.Embedding(9, 4)
    fields = {"rank_pattern": {"first": 3, "inner.a": 1}, "alpha_pattern": {"second": 3.0}, "bias": "lora_only"}
    fields |= {"modules_to_save": ["head", "norm"], "target_modules": {"first", "second", "inner.a"}}
    inject(model, LoRAConfig(r=2, trainable_token_indices=[4, 2], **fields))
    save_adapter(move(model), directory)


@pytest.mark.filterwarnings("ignore:PEFT")
def test_another_process_with_another_hash_seed_writes_the_same_bytes(tmp_path):
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(REPOSITORY)}
    code = f"from tests.lora.test_formats import write_rich; write_rich({str(tmp_path / 'theirs')!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=REPOSITORY)
    write_rich(tmp_path / "ours")
    assert same_files(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("name", ["bert", "encoder"])
def test_dropout_comes_back_where_there_is_an_input_to_drop_from(name, tmp_path):
    model, other = trained(FAMILIES[name], dropout=0.2), FAMILIES[name].build()
    save_adapter(model, tmp_path)
    is_read = {n for n, module in other.named_modules() if isinstance(module, nn.MultiheadAttention)}
    is_read |= {f"{n}.out_proj" for n in is_read}  # torch's attention reads its weights and does not call them
    rows = load_adapter(other, tmp_path).modules
    assert {row.module: row.dropout for row in rows} == {r.module: 0 if r.module in is_read else 0.2 for r in rows}


def test_a_head_of_several_layers_comes_back_as_one_with_batch_statistics_of_its_own(tmp_path):
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
    assert adapter_tensors(other)["1.lora_copy.1.running_mean"].any()
    assert not other.get_submodule("1.1").running_mean.any(), "W0's stay"


# ---- PEFT, both ways

BLOCKS = {"target_modules": ["query", "dense"], "layers_to_transform": [1]}
PEFT_CONFIGS = {
    "one block": {"target_modules": ["key"], "layers_to_transform": 0, "layers_pattern": "layer", "lora_dropout": 0.3},
    "ranks": {"target_modules": ["query", "value", "key"], "rank_pattern": {"query": 1, r".*\.1\..*value": 3}},
    "alphas": {"target_modules": ["query", "value"], "alpha_pattern": {"query": 3, "0.attention.self.value": 7}},
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_a_directory_of_pefts_loads_and_goes_back(tmp_path, name):
    theirs, ours = from_peft(tmp_path / "theirs", **PEFT_CONFIGS[name]), BERT.build()
    listed = json.loads((tmp_path / "theirs" / CONFIG).read_text())["modules_to_save"]
    assert set(listed) == {"classifier", "score"}  # PEFT lists both, the model has one
    report, wanted = load_adapter(ours, tmp_path / "theirs"), output(theirs, TOKENS)
    assert report.saved.keys() == {"classifier"}
    names = [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert [f"base_model.model.{row.module}" for row in report.modules] == names
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(BERT.build(), tmp_path / "ours").eval()
    for model in (ours, again):
        assert distance(output(model, TOKENS), wanted) < 1e-6
    merge(ours)
    assert distance(output(ours, TOKENS), wanted) < 1e-5
    assert distance(output(BERT.build(), TOKENS), wanted) > 1e-2


def test_pefts_loose_heads_load_by_the_modules_that_the_file_holds(tmp_path):
    base, ours = Own(), Own()
    ours.load_state_dict(base.state_dict())
    # wraps lm_head and overhead too
    theirs = directories.of_peft(tmp_path, base, target_modules=["first"], modules_to_save=["head"])
    assert load_adapter(ours, tmp_path).saved.keys() == {"head", "overhead", "lm_head"}
    x = torch.randn(3, 8)
    assert distance(ours(x), theirs(x)) < 1e-6


def test_the_least_that_peft_loads_is_enough(tmp_path):
    model, other = trained(target_modules=["query"]), BERT.build()
    save_adapter(model, tmp_path)
    edit_tensors(tmp_path)
    least = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"]}
    (tmp_path / CONFIG).write_text(json.dumps(least))
    load_adapter(other, tmp_path)
    assert torch.equal(BERT.run(other), BERT.run(model))


def test_bf16_backbones_take_adapters_made_on_them_or_by_peft_and_others_only_when_asked(tmp_path):
    model, other = trained(dtype=torch.bfloat16, **RICH), BERT.build(torch.bfloat16)
    load_adapter(other, save_adapter(model, tmp_path / "bf16"))
    assert torch.equal(BERT.run(other), BERT.run(model))
    from_peft(tmp_path / "peft", target_modules=["query"])
    other = BERT.build(torch.bfloat16)
    name = load_adapter(other, tmp_path / "peft").modules[0].module
    stored = safetensors.torch.load_file(tmp_path / "peft" / WEIGHTS)[f"{PREFIX}{name}.lora_A.weight"]
    assert other.get_submodule(name).lora_A.dtype == torch.float32
    assert torch.equal(other.get_submodule(name).lora_A, stored)
    model, other = trained(**RICH), BERT.build(torch.bfloat16)
    save_adapter(model, tmp_path / "f32")
    refused(tmp_path / "f32", "another base", other)
    load_adapter(other, tmp_path / "f32", allow_other_base=True)
    assert distance(BERT.run(other), BERT.run(model)) < 0.1


# ---- refusals, each in one line, each leaving the model plain


def drop(tensors, part, times=1):
    for name in [n for n in tensors if part in n][:times]:
        del tensors[name]


def put(name, *shape):
    return lambda tensors: tensors.update({f"{PREFIX}{name}": torch.ones(shape)})


def each(part, change):
    return lambda tensors: tensors.update({n: change(x) for n, x in tensors.items() if part in n})


LAYER = "bert.encoder.layer"
CHANGES = {
    "missing B": (lambda t: drop(t, "lora_B"), "missing '.*lora_B.weight'"),
    "missing module": (lambda t: drop(t, "1.attention.self.value.lora", 2), "value' and .* no tensors"),
    "missing bias of head": (lambda t: drop(t, "classifier.bias"), r"missing '.*\.classifier\.bias'"),
    "missing head": (lambda t: drop(t, "classifier", 2), "'classifier' in full and .* no tensors"),
    "surplus module": (
        lambda t: [
            put(f"{LAYER}.0.attention.self.key.lora_{own}.weight", *s)(t) for own, *s in [("A", 2, 16), ("B", 16, 2)]
        ],
        f"left over tensors for '{LAYER}.0.attention.self.key'",
    ),
    "surplus in head": (put("classifier.scale", 1), "left over '.*classifier.scale"),
    "surplus base": (put("bert.pooler.dense.weight", 16, 16), "left over"),
    "dora": (put(f"{LAYER}.0.output.dense.lora_magnitude_vector", 16), "left over.*magnitude"),
    "unknown module": (
        put(f"{LAYER}.7.attention.self.query.lora_A.weight", 2, 16),
        f"no module '{LAYER}.7.attention.self.query'.*did you mean",
    ),
    "no prefix": (lambda t: t.update({"classifier.weight": torch.ones(3, 16)}), "must start with"),
    "narrow A": (each("lora_A", lambda x: x[:, :-1]), "has shape .* expected"),
    "flat A": (each("lora_A", lambda x: x.reshape(-1)), "shape|larger"),
    "empty A": (each("lora_A", lambda x: x[:0]), "at least 1"),
    "short B": (each("lora_B", lambda x: x[:-1]), "has shape .* expected"),
    "small head": (put("classifier.weight", 2, 16), "has shape .2, 16., exp"),
    "whole numbers": (each("lora_B", lambda x: x.int()), "int32, expected"),
    "nothing": (lambda t: t.clear(), "no tensors for"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_keys_and_shapes_that_do_not_fit_are_refused(tmp_path, change):
    save_adapter(trained(**RICH), tmp_path)
    edit_tensors(tmp_path, CHANGES[change][0])
    refused(tmp_path, CHANGES[change][1])
    refused(tmp_path, ".", allow_other_base=True)


@pytest.mark.parametrize("fields", [BLOCKS, {"target_modules": r".*layer\.1.*(key|output\.dense)"}], ids=str)
def test_a_lost_module_is_missed_under_every_kind_of_selection(tmp_path, fields):
    from_peft(tmp_path, **fields)
    edit_tensors(tmp_path, lambda t: drop(t, "layer.1.output.dense.lora", 2))
    refused(tmp_path, f"adapts '{LAYER}.1.output.dense' and .* no tensors")


MISTYPED = [
    *[{"use_dora": 1}, {"bias": "some"}, {"lora_bias": "yes"}, {"fan_in_fan_out": "no"}],
    *[{"trainable_token_indices": [1]}, {"target_parameters": ["x"]}, {"peft_type": None}],
    *[{"r": "8"}, {"r": 2.5}, {"lora_alpha": "16"}, {"lora_alpha": True}, {"lora_dropout": [0]}],
    *[{"use_rslora": "false"}, {"target_modules": 5}, {"target_modules": ["query", 1]}, {"target_modules": "(query"}],
    *[{"exclude_modules": {}}, {"exclude_modules": "*"}, {"modules_to_save": "classifier"}, {"layers_pattern": 3}],
    *[{"alpha_pattern": {"(": 1}}, {"alpha_pattern": [1]}, {"alpha_pattern": {"query": "2"}}, {"rank_pattern": "q"}],
    *[{"layers_to_transform": "0"}, {"layers_to_transform": [0.5]}],
]
TORN = r"must be .* regular expression.* is not a regular expression"
MEANINGS = [
    ({"lora_alpha": 0}, "alpha must be .*got 0"),
    ({"alpha_pattern": {".*query": 0}}, "alpha_pattern.*query.* must be"),
    ({"lora_dropout": 1.5}, "dropout must be .*got 1.5"),
    ({"target_modules": ["key"]}, "adapts '.*key' and|left over tensors for"),
    ({"exclude_modules": ["query"]}, f"left over tensors for '{LAYER}.0.attention.self.query'"),
    ({"target_modules": ["query"]}, f"left over tensors for '{LAYER}.0.attention.self.value'"),
    ({"use_dora": True}, "missing '.*query.lora_magnitude_vector'"),
    ({"lora_bias": True}, "missing '.*query.lora_B.bias'"),
    ({"bias": "lora_only"}, "missing '.*query.base_layer.bias'"),
    ({"modules_to_save": None}, "2 keys.: left over classifier.*none"),
    ({"modules_to_save": ["classifier", "pooler"]}, "saves 'bert.pooler' in full and .* no tensors"),
    ({"exclude_modules": "q)|(v"}, rf"exclude_modules {TORN} \(unbalanced"),  # torn inside PEFT's own group
    ({"alpha_pattern": {"fine": 3, "q)|(v": 3}}, rf"alpha_pattern {TORN} \(unbalanced"),
]


@pytest.mark.parametrize(
    ("setting", "match"), [*((s, next(iter(s))) for s in MISTYPED), *MEANINGS], ids=lambda value: str(value)[:40]
)
def test_settings_without_a_meaning_are_refused(tmp_path, setting, match):
    save_adapter(trained(**RICH), tmp_path)
    edit_tensors(tmp_path)  # as PEFT writes it, without our record
    edit_config(tmp_path, **setting)
    refused(tmp_path, match)


def test_a_config_or_tensors_of_ours_that_say_another_thing_are_refused(tmp_path):
    """By the field; test_fuzz.py changes every one."""
    save_adapter(trained(**RICH, trainable_token_indices={"word_embeddings": [1, 5]}), tmp_path)
    whole = (tmp_path / CONFIG).read_text()
    tokens = {"bert.embeddings.word_embeddings": [1, 7]}
    for field, value in {"lora_alpha": 6, "alpha_pattern": None, "trainable_token_indices": tokens}.items():
        edit_config(tmp_path, **{field: value})
        refused(tmp_path, rf"was changed since it was saved, in {field}=.*base_model_name_or_path.* may be changed")
        (tmp_path / CONFIG).write_text(whole)
    edit_tensors(tmp_path, lambda t: next(iter(t.values())).view(-1)[3:4].mul_(1 + 1e-6), record=True)
    refused(tmp_path, "was changed since it was saved", allow_other_base=True)


def test_a_config_of_ours_may_be_edited_where_it_changes_nothing_of_the_update(tmp_path):
    model, other = trained(target_modules=["query"], alpha=4), BERT.build()
    save_adapter(model, tmp_path)
    edit_config(tmp_path, base_model_name_or_path="other/name", revision="main", inference_mode=False)
    edit_config(tmp_path, task_type="SEQ_CLS", auto_mapping=None, lora_alpha=4.0, exclude_modules=None, lora_bias=None)
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["use_dora"]
    (tmp_path / CONFIG).write_text(json.dumps(dict(reversed(config.items()))))
    load_adapter(other, tmp_path)
    assert torch.equal(BERT.run(other), BERT.run(model))


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_files_that_are_missing_or_torn_are_refused(tmp_path, file):
    save_adapter(trained(**RICH), tmp_path)
    data = (tmp_path / file).read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:1234"
    for cut in (b"", data[:20], data[: len(data) // 2], data[:-2], data + b"\0", b"\xff" * 8 + data[8:], pointer):
        (tmp_path / file).write_bytes(cut)
        refused(tmp_path, re.escape(file))
    (tmp_path / file).unlink()
    refused(tmp_path, re.escape(file))
    refused(tmp_path / "nowhere", "no folder")


TORN_RECORDS = ["", "{}", "[1]", '{"base": 3}', '{"base": {"digest": "a", "tensors": 5}}', "null"]
OLD = ('{"base": {"digest": "a", "tensors": {}}}', "of format 1 and this version reads format 2; PEFT opens")


@pytest.mark.parametrize(("record", "words"), [*((r, "record of its base cannot be read") for r in TORN_RECORDS), OLD])
def test_a_record_that_cannot_be_read_is_refused(tmp_path, record, words):
    save_adapter(trained(**RICH), tmp_path)
    tensors, metadata = read_tensors(tmp_path / WEIGHTS)
    write_tensors(tmp_path / WEIGHTS, tensors, {**metadata, PROVENANCE: record})
    for allow in (False, True):
        refused(tmp_path, words, allow_other_base=allow)


def test_what_has_no_values_is_neither_loaded_into_nor_saved(tmp_path):
    save_adapter(trained(**RICH), tmp_path / "a")
    with torch.device("meta"):
        model, mine = bert(), sequential()
    for allow in (False, True):
        with pytest.raises(AdapterError, match="meta device"):
            load_adapter(model, tmp_path / "a", allow_other_base=allow)
    assert not [m for m in model.modules() if hasattr(m, "lora_A")]
    inject(mine, LoRAConfig(r=2))
    with pytest.raises(AdapterError, match="meta device and has no values to save: give it its weights"):
        save_adapter(mine, tmp_path / "new")
    with pytest.raises(AdapterError, match="no adapter"):
        save_adapter(sequential(), tmp_path / "new")
    layer = nn.Linear(4, 4)
    inject(layer, LoRAConfig(r=1))
    with pytest.raises(AdapterError, match="has no name: wrap it"):
        save_adapter(layer, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_save_with_something_in_the_way_is_one_clear_error(tmp_path, name):
    (tmp_path / "in" / name / "the way").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    for place, match in (("in", "is a directory"), ("file", "expected a directory")):
        with pytest.raises(LoRAError, match=rf"{place}' cannot be written .*{match}"):
            save_adapter(trained(), tmp_path / place)
    assert [path.name for path in (tmp_path / "in").iterdir()] == [name]
    assert (tmp_path / "file").read_text() == "mine"
