"""A merge from files to files is the merge in memory, holds little in memory, and its folder is whole or as it was."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from functools import partial

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.merge_on_disk import make_adapter, make_base, measure, shape_of
from lora_lightning import LoRAConfig, LoRAError, inject, load_adapter, merge, save_adapter
from lora_lightning.export.merge_on_disk import merge_on_disk
from lora_lightning.lora import merge as merging
from lora_lightning.lora.errors import AdapterError, AdapterWarning, MergeError
from lora_lightning.lora.formats.tensor_files import as_bytes
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.lora.layers import base as base_layer
from tests.factories import hf
from tests.lora.directories import edit_config, edit_tensors, names, of_peft
from tests.lora.kinds import run_seq2seq, t5
from tests.lora.laws import relative, stir
from tests.lora.test_families import BERT, FAMILIES, GROUPED, SMALL, image, logits
from tests.lora.test_peft_limits import deepseek

SHARD = "12KB"


# Pools with an nn.MultiheadAttention.
siglip = partial(hf, "SiglipVisionModel", **SMALL, image_size=32, patch_size=16)
tied_llama = partial(hf, "LlamaForCausalLM", **GROUPED, tie_word_embeddings=True)


def pooled(model):
    return model(image(model)).pooler_output


def gemma3_with_eyes():
    """Its language model is a part with a config of its own, and its files' keys are renamed on loading."""
    text, vision = tf.Gemma3TextConfig(**GROUPED, head_dim=8), {**SMALL, "image_size": 32, "patch_size": 16}
    parts = {"text_config": text.to_dict(), "vision_config": tf.SiglipVisionConfig(**vision).to_dict()}
    return tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(**parts, mm_tokens_per_image=4))


FROM_FAMILIES = ["llama", "mixtral", "gpt2", "gpt-neox", "bert", "deberta-v2", "t5", "vit", "convnext", "clip"]
FROM_FAMILIES += ["whisper", "phi3 in parts"]
LLAMA, GPT2, BERT_CLS = (FAMILIES[name][0] for name in ("llama", "gpt2", "bert"))
# name: (make, run, config)
CASES = {
    **{name: FAMILIES[name] for name in FROM_FAMILIES},
    "a tied head in a part": (gemma3_with_eyes, logits, {"target_modules": ["lm_head", "q_proj"]}),
    "experts of deepseek": (deepseek, logits, FAMILIES["mixtral"][2]),
    "a tied embedding": (tied_llama, logits, {"target_modules": ["embed_tokens", "q_proj"]}),
    "a tied head": (tied_llama, logits, {"target_modules": ["lm_head", "q_proj"]}),
    "a head of T5's four ties": (t5, run_seq2seq, {"target_modules": ["lm_head", "q"]}),
    "DoRA": (LLAMA, logits, {"use_dora": True, "target_modules": ["embed_tokens", "q_proj", "down_proj"]}),
    "DoRA on Conv1D and every bias": (GPT2, logits, {"use_dora": True, "bias": "all"}),
    "biases of B": (BERT_CLS, logits, {"lora_bias": True, "bias": "lora_only"}),
    "a head in full": (BERT_CLS, logits, {"modules_to_save": ["classifier"], "use_rslora": True}),
    "both of two tied in full": (tied_llama, logits, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "token rows": (tied_llama, logits, {"trainable_token_indices": [1, 5, 9]}),
    "a start from W0": (LLAMA, logits, {"init": "pissa", "target_modules": ["q_proj"]}),
    "nn.MultiheadAttention": (siglip, pooled, {"target_modules": ["attention", "out_proj", "fc1"]}),
}


def prepared(folder, make, run, config, dtype=torch.float32, loaded="auto"):
    """A base in shards, an adapter on it, and what the adapted model computes."""
    torch.manual_seed(0)
    plain = make().to(dtype)
    plain.save_pretrained(folder / "base", max_shard_size=SHARD)
    (folder / "base" / "tokenizer.json").write_text("{}")
    model = type(plain).from_pretrained(folder / "base", dtype=loaded).eval()
    inject(model, LoRAConfig(**{"r": 2, **config}))
    save_adapter(stir(model), folder / "adapter")
    with torch.no_grad():
        return model, run(model)


def merged(folder, **options):
    return merge_on_disk(folder / "base", folder / "adapter", folder / "out", **options)


def stored(folder):
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))


def alike(model):
    """Frozen and at even addresses: torch's kernels are chosen by both, and do not add up in one order."""
    for parameter in model.requires_grad_(False).parameters():
        parameter.data = parameter.data.clone()
    return model


IN_BFLOAT16 = ["llama", "mixtral", "gpt2", "t5", "vit", "convnext", "a tied head", "DoRA", "biases of B", "token rows"]


@pytest.mark.parametrize(
    ("case", "dtype"), [*((c, torch.float32) for c in CASES), *((c, torch.bfloat16) for c in IN_BFLOAT16)], ids=str
)
def test_streamed_equals_merged_in_memory(case, dtype, tmp_path):
    make, run, config = CASES[case]
    model, adapted = prepared(tmp_path, make, run, config, dtype)
    report = merged(tmp_path)

    opened = type(model).from_pretrained(tmp_path / "out", dtype="auto").eval()  # by transformers alone
    in_memory = type(model).from_pretrained(tmp_path / "base", dtype="auto").eval()
    load_adapter(in_memory, tmp_path / "adapter")
    kept = merge(in_memory).kept
    with torch.no_grad():
        assert torch.equal(run(alike(opened)), run(alike(in_memory)))
        if dtype == torch.float32:  # rounded weights may send a token to another expert
            assert relative(run(opened), adapted) <= 1e-5
    want = in_memory.state_dict()
    assert opened.state_dict().keys() == want.keys()
    assert [k for k, t in opened.state_dict().items() if not same_bits(t, want[k])] == []
    assert report.kept == pytest.approx(kept)
    assert report.base_checked

    before, after = stored(tmp_path / "base"), stored(tmp_path / "out")
    assert before.keys() | set(report.new) == after.keys()
    assert sum(not same_bits(t, before[k]) for k, t in after.items() if k in before) <= report.changed
    assert set(names(tmp_path / "out")) ^ set(names(tmp_path / "base")) == {"merge_report.json"}
    assert names(tmp_path) == ["adapter", "base", "out"]


def test_nothing_but_the_adapted_tensors_changes_by_a_bit(tmp_path):
    prepared(tmp_path, *FAMILIES["mixtral"][:2], {"target_modules": ["q_proj"]})
    extra = {"old.counter": torch.arange(3), "old.scale": torch.ones(2, dtype=torch.float8_e4m3fn)}
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    file = sorted(set(index["weight_map"].values()))[0]
    save_file({**load_file(tmp_path / "base" / file), **extra}, tmp_path / "base" / file, metadata={"format": "pt"})

    merged(tmp_path)
    before, after = stored(tmp_path / "base"), stored(tmp_path / "out")
    changed = {key for key in before if not same_bits(before[key], after[key])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    for name in set(index["weight_map"].values()):
        with safe_open(tmp_path / "out" / name, "pt") as new, safe_open(tmp_path / "base" / name, "pt") as old:
            assert set(new.keys()) == set(old.keys())
            assert new.metadata() == old.metadata()
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()


@pytest.mark.parametrize("asked", [None, torch.float32, torch.float16], ids=str)
def test_the_dtype_that_was_asked_for_is_rounded_to_once_as_in_memory(asked, tmp_path):
    model, _ = prepared(tmp_path, *FAMILIES["llama"][:2], {}, torch.bfloat16)
    name = str(asked or torch.bfloat16).removeprefix("torch.")
    merged(tmp_path, dtype=name if asked else "auto")
    merge(model, dtype=asked)
    want = model.state_dict()
    assert [k for k, tensor in stored(tmp_path / "out").items() if not same_bits(tensor, want[k])] == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name


BY_PEFT = [{}, {"use_dora": True}, {"use_rslora": True, "target_modules": ["lm_head", "v_proj"]}]
BY_PEFT += [{"init_lora_weights": "pissa"}]  # of which the file holds A and B, and W0 alone A0 and B0


@pytest.mark.parametrize("options", BY_PEFT, ids=str)
def test_an_adapter_of_pefts_own_equals_pefts_merge(options, tmp_path):
    torch.manual_seed(0)
    plain = LLAMA()
    plain.save_pretrained(tmp_path / "base", max_shard_size=SHARD)
    theirs = of_peft(tmp_path / "adapter", plain, **{"r": 4, "target_modules": ["q_proj", "down_proj"], **options})
    with pytest.warns(AdapterWarning):
        report = merged(tmp_path)
    want = theirs.merge_and_unload().state_dict()
    opened = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert opened.keys() == want.keys()
    assert max(relative(opened[key], want[key]) for key in want) < 1e-6
    assert not report.base_checked


BODY = (lambda: tf.BertModel(tf.BertConfig(**BERT)), {"num_labels": 3}, "classifier")


@pytest.mark.parametrize(("make", "options", "head"), [(LLAMA, {"num_labels": 5, "pad_token_id": 0}, "score"), BODY])
def test_a_head_that_the_base_lacks_is_written_as_the_task_says(make, options, head, tmp_path):
    """A headless BERT's files have no `bert.`: they stay so, and the classifier goes beside them."""
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base", max_shard_size=SHARD)
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **options).eval()
    inject(model, LoRAConfig(r=2, modules_to_save=[head]))
    save_adapter(stir(model), tmp_path / "adapter", task_type="SEQ_CLS")
    report = merged(tmp_path)
    assert report.new == [
        f"{head}.{name}" for name, _ in model.get_submodule(head).named_parameters() if "." not in name
    ]
    opened = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", pad_token_id=0).eval()
    assert opened.config.num_labels == options["num_labels"]
    assert opened.config.architectures == [type(model).__name__]
    assert relative(logits(opened), logits(model)) < 1e-5


def test_a_base_that_was_loaded_in_another_dtype_is_still_the_base(tmp_path):
    prepared(tmp_path, *FAMILIES["llama"], loaded=torch.bfloat16)
    assert merged(tmp_path).base_checked


def test_a_file_beside_shards_is_what_transformers_opens(tmp_path):
    """As it is there, one file goes before shards; and an adapter's config beside the base stays behind."""
    model, adapted = prepared(tmp_path, *FAMILIES["llama"])
    base = tmp_path / "base"
    save_file(stored(base), base / "model.safetensors", metadata={"format": "pt"})
    (base / "adapter_config.json").write_text("{}")
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "out")
    there = ["config.json", "generation_config.json", "merge_report.json", "model.safetensors", "tokenizer.json"]
    assert names(tmp_path / "out") == there
    assert relative(logits(type(model).from_pretrained(tmp_path / "out").eval()), adapted) < 1e-5


def edit_index(base, change):
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def shards(base):
    return sorted(base.glob("*.safetensors"))


def cut(base):
    shards(base)[1].write_bytes(shards(base)[1].read_bytes()[:-8])


def edit_shard(base, key, change):
    for shard in shards(base):
        tensors = load_file(shard)
        if key in tensors:
            change(tensors)
            save_file(tensors, shard, metadata={"format": "pt"})


ONE, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


def change_one(base):
    edit_shard(base, ONE, lambda tensors: tensors[ONE][0, 0].add_(1))


def drop_one(base):
    edit_shard(base, NORM, lambda tensors: tensors.pop(NORM))
    edit_index(base, lambda files: files.pop(NORM))


def only_pickles(base):
    for path in [*shards(base), base / "model.safetensors.index.json"]:
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"x")


def change_adapter(base):
    edit_tensors(base.parent / "adapter", lambda tensors: next(iter(tensors.values())).view(-1)[0].add_(1), record=True)


def put_twice(base):
    first, second = shards(base)[:2]
    key, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), key: tensor + 1}, second, metadata={"format": "pt"})


def of_config(**fields):
    return lambda base: edit_config(base, "config.json", **fields)


REFUSED = {
    "a tensor in two shards": (put_twice, "in two files of .*00001-of-.* and .*00002-of-.*; .*index.json names .*01"),
    "another base": (change_one, "made on another base: 1 of .* differ, first model.layers.1.mlp.up_proj.weight"),
    "a torn shard": (cut, "00002-of-"),
    "a shard that is not there": (lambda base: shards(base)[0].unlink(), "no file .*00001-of"),
    "a tensor that no file holds": (
        lambda base: edit_index(base, lambda files: files.update(gone=shards(base)[0].name)),
        "names tensors that no file holds .gone",
    ),
    "a base that lacks a tensor": (drop_one, "no values for 1 tensors of LlamaForCausalLM.*model.norm.weight"),
    "pickles only": (only_pickles, "holds neither model.safetensors nor"),
    "no config": (lambda base: (base / "config.json").unlink(), "no file .*config.json"),
    "a quantized base": (of_config(quantization_config={"quant_method": "gptq", "bits": 4}), "is quantized"),
    "an unknown architecture": (of_config(architectures=["FooForBar"]), "'FooForBar', which transformers does not"),
    "a config of other sizes": (of_config(intermediate_size=32), "expected|config.json describes has"),
    "an adapter that was changed": (change_adapter, "was changed since it was saved"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused_and_leaves_nothing(name, tmp_path):
    spoil, said = REFUSED[name]
    prepared(tmp_path, *FAMILIES["llama"])
    spoil(tmp_path / "base")
    there = names(tmp_path)
    with pytest.raises(LoRAError, match=said):
        merged(tmp_path)
    assert names(tmp_path) == there
    if name == "another base":
        with pytest.warns(AdapterWarning, match=f"another base: 1 of .* differ, first {ONE}"):
            assert not merged(tmp_path, allow_other_base=True).base_checked


PARTS = {
    "Linear": (LLAMA, {}),
    "Conv1D in parts": (GPT2, {"slices": {"c_attn": ["q", "v"]}}),
    "DoRA": (LLAMA, {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "a start": (LLAMA, {"init": "pissa", "target_modules": ["q_proj", "down_proj"]}),
    "Embedding": (LLAMA, {"target_modules": ["embed_tokens"]}),
    "experts": (FAMILIES["mixtral"][0], {**FAMILIES["mixtral"][2], "target_modules": ["q_proj"]}),
}


@pytest.mark.parametrize("case", PARTS)
@torch.no_grad()
def test_a_layer_in_parts_merges_as_the_whole(case, monkeypatch):
    make, config = PARTS[case]
    torch.manual_seed(0)
    model = make().double()
    inject(model, LoRAConfig(**{"r": 2, **config}))
    stir(model)
    for name, layer in adapted_layers(model):
        whole, kept = merging.merged_weights(layer)
        monkeypatch.setattr(base_layer, "BLOCK", 70)
        assert len(list(layer.updates())) > 1
        in_parts, kept_in_parts = merging.merged_weights(layer)
        monkeypatch.undo()
        assert all(relative(in_parts[own], whole[own]) < 1e-14 for own in whole), name
        assert kept_in_parts == pytest.approx(kept)


# ---- numbers that half precision cannot hold, and what else is said


def classifier(folder, own=torch.float32, **options):
    torch.manual_seed(0)
    tf.BertForSequenceClassification(tf.BertConfig(**BERT)).to(own).save_pretrained(folder / "base")
    model = tf.BertForSequenceClassification.from_pretrained(folder / "base", dtype="auto").eval()
    inject(model, LoRAConfig(r=2, target_modules=["query"], **options))
    return stir(model)


QUERY, POOLER = "bert.encoder.layer.0.attention.self.query", "bert.pooler.dense.weight"
BEYOND = {
    "a module saved in full": ({"modules_to_save": ["classifier"]}, "classifier.lora_copy.weight", "classifier.weight"),
    "another's bias": ({"bias": "all"}, "bert.pooler.dense.lora_trained_bias", "bert.pooler.dense.bias"),
    "an update": ({}, f"{QUERY}.lora_B", QUERY),
    "W0": ({}, POOLER, POOLER),
}
OF_HALF = [(what, torch.float16, "auto") for what in BEYOND if what != "W0"]  # whose own is infinite then


@pytest.mark.parametrize(("what", "own", "dtype"), OF_HALF + [(what, torch.float32, "float16") for what in BEYOND])
def test_no_number_becomes_infinite(what, own, dtype, tmp_path):
    options, where, said = BEYOND[what]
    model = classifier(tmp_path, own, **options)
    model.get_parameter(where).data.fill_(3e5)
    save_adapter(model, tmp_path / "adapter")
    if what == "W0":
        edit_shard(tmp_path / "base", where, lambda tensors: tensors[where].fill_(3e5))
    with pytest.raises(MergeError, match=rf"{said}'.* is larger than float16 can hold"):
        merged(tmp_path, dtype=dtype)
    assert names(tmp_path) == ["adapter", "base"]


def test_rounding_that_took_much_of_an_update_is_told(tmp_path):
    model = classifier(tmp_path, torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1e-4 if "lora_B" in name else 1.0)
    save_adapter(model, tmp_path / "adapter")
    with pytest.warns(AdapterWarning, match=r"rounding to bfloat16 kept less than 90% .* in 2 of 2 layers"):
        assert max(merged(tmp_path).kept.values()) < 0.9


def test_an_alpha_in_doubt_is_asked_for_and_what_load_adapter_says_is_said_once(tmp_path):
    torch.manual_seed(0)
    plain, name = LLAMA(), "model.layers.0.self_attn.q_proj"
    plain.save_pretrained(tmp_path / "base")
    want = of_peft(tmp_path / "adapter", plain, alpha_pattern={"0.self_attn.q_proj": 3, "q_proj": 5})
    edit_config(tmp_path / "adapter", use_something_new=True)
    with pytest.raises(AdapterError, match=f"pass alphas=.'{name}'"):
        merged(tmp_path)
    with pytest.warns(AdapterWarning) as said:
        merged(tmp_path, alphas={name: 3})
    told = [str(one.message) for one in said if one.category is AdapterWarning]
    assert len(set(told)) == len(told) == 2, "no fingerprint, and a setting that is unknown"
    want, got = want.merge_and_unload().state_dict(), stored(tmp_path / "out")
    assert max(relative(tensor, want[key]) for key, tensor in got.items()) < 1e-6


# ---- the folder


@pytest.fixture
def ready(tmp_path):
    save_adapter(classifier(tmp_path), tmp_path / "adapter")
    return tmp_path


def test_no_room_is_said_before_the_first_byte(ready, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(free=1000))
    with pytest.raises(LoRAError, match=r"needs about .* and .* has 1\.0 kB free"):
        merged(ready)
    assert names(ready) == ["adapter", "base"]


def test_a_merge_replaces_its_own_output_and_nothing_else(ready):
    out = ready / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(LoRAError, match="holds files that are not a merged model"):
        merged(ready)
    (out / "mine.txt").unlink()
    merged(ready)
    once = {path.name: path.read_bytes() for path in out.iterdir()}
    merged(ready)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == once
    (out / "mine.txt").write_text("x")
    with pytest.raises(LoRAError, match=r"holds files that no merge wrote \(mine\.txt\)"):
        merged(ready)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {**once, "mine.txt": b"x"}


def test_neither_base_nor_adapter_gives_way_or_grows(ready):
    base, adapter, out = (ready / name for name in ("base", "adapter", "out"))
    with pytest.raises(LoRAError, match="lies in the base"):
        merge_on_disk(base, adapter, base / "merged")
    merged(ready)
    adapter.rename(out / "adapter")
    with pytest.raises(LoRAError, match=r"holds (the adapter|files that no merge wrote)"):
        merge_on_disk(base, out / "adapter", out)
    (out / "adapter").rename(adapter)
    with pytest.raises(LoRAError, match="holds the base"):
        merge_on_disk(out, adapter, out)
    assert (out / "model.safetensors").is_file()
    out.rename(base / "merged")  # a merge that lies in a base is no part of it
    (base / "extra").mkdir()
    (base / "extra" / "vocab.txt").write_text("x")
    merged(ready)
    assert not (out / "merged").exists()
    assert (out / "extra" / "vocab.txt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_memory_stays_below_twice_the_largest_shard(kind, tmp_path):
    """300 MB in six shards of 50 MB, every linear layer, the output head and all experts adapted."""
    config, model = shape_of(kind, 0.3, width=1024 if kind == "llama" else 512, vocabulary=8000, dtype=torch.bfloat16)
    largest, whole = make_base(tmp_path / "base", config, model, torch.bfloat16)
    make_adapter(tmp_path / "adapter", model, r=8, lm_head=True)
    peak, _, changed, _ = measure(kind, tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert changed > 50
    assert whole > 5 * largest
    assert peak < (2 if kind == "llama" else 2.3) * largest, f"{peak / largest:.2f} times the largest shard"
