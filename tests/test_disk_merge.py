"""A merge on disk takes what loading takes, says what loading says, and its folder is whole or as it was."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
import warnings

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import lora_lightning
from lora_lightning import LoRAConfig, LoRAError, inject, load_adapter, merge, merge_on_disk, save_adapter
from lora_lightning.lora.errors import AdapterError, AdapterWarning, MergeError
from lora_lightning.lora.formats.atomic_dir import _host
from tests.lora.laws import relative, stir
from tests.lora.test_families import BERT, logits


def classifier(folder, own=torch.float32, **options):
    """A BERT classifier in `folder / "base"` and the same with an adapter, stirred."""
    torch.manual_seed(0)
    tf.BertForSequenceClassification(tf.BertConfig(**BERT)).to(own).save_pretrained(folder / "base")
    model = tf.BertForSequenceClassification.from_pretrained(folder / "base", dtype="auto").eval()
    inject(model, LoRAConfig(r=2, target_modules=["query"], **options))
    return stir(model)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_name_is_the_function_also_once_its_module_is_loaded():
    module = importlib.import_module("lora_lightning.export.merge_on_disk")
    assert lora_lightning.merge_on_disk is merge_on_disk is module.merge_on_disk
    assert isinstance(merge_on_disk, types.FunctionType)


QUERY = "bert.encoder.layer.0.attention.self.query"
BEYOND = {
    "a module saved in full": ({"modules_to_save": ["classifier"]}, "classifier.lora_copy.weight", "classifier.weight"),
    "a trained bias": ({"bias": "lora_only"}, f"{QUERY}.lora_trained_bias", f"{QUERY}.bias"),
    "another module's trained bias": (
        {"bias": "all"},
        "bert.pooler.dense.lora_trained_bias",
        "bert.pooler.dense.bias",
    ),
    "a bias of B": ({"lora_bias": True}, f"{QUERY}.lora_B_bias", rf"{QUERY}(\.bias)?"),
    "a token's row": (
        {"trainable_token_indices": {"word_embeddings": [1]}},
        "bert.embeddings.word_embeddings.lora_tokens",
        "bert.embeddings.word_embeddings.weight",
    ),
    "an update": ({}, f"{QUERY}.lora_B", QUERY),
}


@pytest.mark.parametrize(("own", "dtype"), [(torch.float16, "auto"), (torch.float32, "float16")], ids=str)
@pytest.mark.parametrize("what", BEYOND)
def test_no_trained_number_becomes_infinite(what, own, dtype, tmp_path):
    options, where, said = BEYOND[what]
    model = classifier(tmp_path, own, **options)
    with torch.no_grad():
        model.get_parameter(where).fill_(3e5)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(MergeError, match=rf"{said}'.* is larger than float16 can hold"):
        merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype=dtype)
    assert names(tmp_path) == ["adapter", "base"]


def test_no_weight_of_the_base_becomes_infinite(tmp_path):
    save_adapter(classifier(tmp_path), tmp_path / "adapter")
    file, name = tmp_path / "base" / "model.safetensors", "bert.pooler.dense.weight"
    tensors = load_file(file)
    tensors[name][0, 0] = 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    args = [tmp_path / "base", tmp_path / "adapter", tmp_path / "out"]
    with pytest.raises(MergeError, match=f"'{name}' is larger than float16 can hold"):
        merge_on_disk(*args, dtype="float16", allow_other_base=True)
    with pytest.warns(AdapterWarning, match="another base"):
        merge_on_disk(*args, dtype="bfloat16", allow_other_base=True)


def test_an_old_pickle_in_pefts_raw_spelling_merges_with_its_head(tmp_path):
    torch.manual_seed(0)
    tf.BertForSequenceClassification(tf.BertConfig(**BERT)).save_pretrained(tmp_path / "base")
    plain = tf.BertForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True
    ).eval()
    theirs = peft.get_peft_model(
        plain, peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    raw = {key: tensor for key, tensor in theirs.state_dict().items() if ".default" in key}
    assert any(".modules_to_save.default." in key for key in raw)
    torch.save(raw, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.warns(AdapterWarning, match="notes no fingerprint"):
        merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    opened = tf.BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert opened.config.num_labels == 5
    assert relative(logits(opened), logits(theirs)) < 1e-5


def test_an_alpha_in_doubt_is_asked_for_and_taken(tmp_path):
    torch.manual_seed(0)
    plain = tf.BertForSequenceClassification(tf.BertConfig(**BERT)).eval()
    plain.save_pretrained(tmp_path / "base")
    pattern = {"layer.0.attention.self.query": 3, "query": 5}
    config = peft.LoraConfig(r=2, target_modules=["query"], alpha_pattern=pattern, init_lora_weights=False)
    peft.get_peft_model(plain, config).save_pretrained(tmp_path / "adapter")
    args = [tmp_path / "base", tmp_path / "adapter", tmp_path / "out"]
    with pytest.raises(AdapterError, match=f"pass alphas=.'{QUERY}'"):
        merge_on_disk(*args)
    with pytest.warns(AdapterWarning):
        merge_on_disk(*args, alphas={QUERY: 3})
    want = tf.BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    with pytest.warns(AdapterWarning):
        load_adapter(want, tmp_path / "adapter", alphas={QUERY: 3})
    merge(want)
    got = tf.BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert all(torch.equal(got.state_dict()[key], tensor) for key, tensor in want.state_dict().items())


def test_a_setting_that_is_unknown_here_is_said_once(tmp_path):
    plain = tf.BertForSequenceClassification(tf.BertConfig(**BERT)).eval()
    plain.save_pretrained(tmp_path / "base")
    peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["query"])).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_something_new": True}))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sum("use_something_new" in str(one.message) for one in said) == 1
    assert sum("notes no fingerprint" in str(one.message) for one in said) == 1


def test_rounding_that_took_much_of_an_update_is_told(tmp_path):
    model = classifier(tmp_path, torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1e-4 if "lora_B" in name else 1.0)
    save_adapter(model, tmp_path / "adapter")
    with pytest.warns(AdapterWarning, match=r"rounding to bfloat16 kept less than 90% .* in 2 of 2 layers"):
        report = merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert max(report.kept.values()) < 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "wide", dtype="float32")


@pytest.fixture
def places(tmp_path):
    save_adapter(classifier(tmp_path), tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", tmp_path / "out"


def test_a_merge_replaces_its_own_output_and_nothing_else(places):
    merge_on_disk(*places)
    once = {path.name: path.read_bytes() for path in places[2].iterdir()}
    merge_on_disk(*places)
    assert {path.name: path.read_bytes() for path in places[2].iterdir()} == once
    (places[2] / "mine.txt").write_text("x")
    with pytest.raises(LoRAError, match=r"holds files that no merge wrote \(mine\.txt\)"):
        merge_on_disk(*places)
    assert (places[2] / "mine.txt").read_text() == "x"
    assert (places[2] / "model.safetensors").read_bytes() == once["model.safetensors"]


def test_an_empty_folder_behind_a_link_is_filled(places):
    (places[2].parent / "there").mkdir()
    places[2].symlink_to(places[2].parent / "there")
    merge_on_disk(*places)
    assert places[2].is_symlink()
    assert (places[2].parent / "there" / "config.json").is_file()


def test_what_a_killed_merge_left_is_cleared_away(places):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = places[2].parent / f".out.{_host()}.{dead.pid}.new.part"
    left.mkdir()
    merge_on_disk(*places)
    assert names(places[2].parent) == ["adapter", "base", "out"]


def test_neither_base_nor_adapter_gives_way_or_grows(places):
    base, adapter, out = places
    with pytest.raises(LoRAError, match="lies in the base"):
        merge_on_disk(base, adapter, base / "merged")
    merge_on_disk(*places)
    adapter.rename(out / "adapter")
    with pytest.raises(LoRAError, match=r"holds (the adapter|files that no merge wrote)"):
        merge_on_disk(base, out / "adapter", out)
    (out / "adapter").rename(adapter)
    with pytest.raises(LoRAError, match="holds the base"):
        merge_on_disk(out, adapter, out)
    assert (out / "model.safetensors").is_file()


def test_a_merge_that_lies_in_a_base_is_no_part_of_it(places):
    base, adapter, out = places
    merge_on_disk(base, adapter, out)
    out.rename(base / "merged")
    (base / "extra").mkdir()
    (base / "extra" / "vocab.txt").write_text("x")
    merge_on_disk(base, adapter, out)
    assert not (out / "merged").exists()
    assert (out / "extra" / "vocab.txt").is_file()
