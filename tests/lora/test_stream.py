"""A merge from files to files is the merge in memory, holds little in memory, and fails without a trace."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import peft
import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.merge_on_disk import make_adapter, make_base, measure, shape_of
from lora_lightning import LoRAConfig, LoRAError, inject, load_adapter, merge, save_adapter
from lora_lightning.export.merge_on_disk import merge_on_disk
from lora_lightning.lora import merge as merging
from lora_lightning.lora.errors import AdapterWarning
from lora_lightning.lora.formats.tensor_files import as_bytes
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.lora.layers import base as base_layer
from tests.lora.laws import relative, stir
from tests.lora.test_families import BERT, FAMILIES, GROUPED, SMALL, image, logits, seq2seq

SHARD = "12KB"


def siglip():
    vision = {**SMALL, "image_size": 32, "patch_size": 16}
    return tf.SiglipVisionModel(tf.SiglipVisionConfig(**vision))  # pools with an nn.MultiheadAttention


def tied_t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes))


def tied_llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, tie_word_embeddings=True))


def gemma3_with_eyes():
    """Its language model is a part with a config of its own, and its files' keys are renamed on loading."""
    text, vision = tf.Gemma3TextConfig(**GROUPED, head_dim=8), {**SMALL, "image_size": 32, "patch_size": 16}
    parts = {"text_config": text.to_dict(), "vision_config": tf.SiglipVisionConfig(**vision).to_dict()}
    return tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(**parts, mm_tokens_per_image=4))


def deepseek():
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    ranks = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    sizes = {**GROUPED, "num_key_value_heads": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1}
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**sizes, **experts, **ranks))


FROM_FAMILIES = [
    "llama",
    "mixtral",
    "gpt2",
    "gpt-neox",
    "bert",
    "deberta-v2",
    "t5",
    "vit",
    "convnext",
    "clip",
    "whisper",
]
LLAMA, GPT2, BERT_CLS = (FAMILIES[name][0] for name in ("llama", "gpt2", "bert"))
# name: (make, run, config)
CASES = {
    **{name: FAMILIES[name] for name in FROM_FAMILIES},
    "phi3 in parts": FAMILIES["phi3 in parts"],
    "a tied head in a part": (gemma3_with_eyes, logits, {"target_modules": ["lm_head", "q_proj"]}),
    "experts of deepseek": (deepseek, logits, FAMILIES["mixtral"][2]),
    "a tied embedding": (tied_llama, logits, {"target_modules": ["embed_tokens", "q_proj"]}),
    "a tied head": (tied_llama, logits, {"target_modules": ["lm_head", "q_proj"]}),
    "a head of T5's four ties": (tied_t5, seq2seq, {"target_modules": ["lm_head", "q"]}),
    "DoRA": (LLAMA, logits, {"use_dora": True, "target_modules": ["embed_tokens", "q_proj", "down_proj"]}),
    "DoRA on Conv1D and every bias": (GPT2, logits, {"use_dora": True, "bias": "all"}),
    "biases of B": (BERT_CLS, logits, {"lora_bias": True, "bias": "lora_only"}),
    "a head in full": (BERT_CLS, logits, {"modules_to_save": ["classifier"], "use_rslora": True}),
    "both of two tied in full": (tied_llama, logits, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "token rows": (tied_llama, logits, {"trainable_token_indices": [1, 5, 9]}),
    "a start from W0": (LLAMA, logits, {"init": "pissa", "target_modules": ["q_proj"]}),
    "nn.MultiheadAttention": (
        siglip,
        lambda model: model(image(model)).pooler_output,
        {"target_modules": ["attention", "out_proj", "fc1"]},
    ),
}


def prepared(folder, make, run, config, dtype=torch.float32):
    """A base in shards, an adapter on it, and what the adapted model computes."""
    torch.manual_seed(0)
    plain = make().to(dtype)
    plain.save_pretrained(folder / "base", max_shard_size=SHARD)
    (folder / "base" / "tokenizer.json").write_text("{}")
    model = type(plain).from_pretrained(folder / "base", dtype="auto").eval()
    inject(model, LoRAConfig(**{"r": 2, **config}))
    save_adapter(stir(model), folder / "adapter")
    with torch.no_grad():
        return model, run(model)


def stored(folder):
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))


def alike(model):
    """Frozen and at even addresses: torch's kernels are chosen by both, and do not add up in one order."""
    for parameter in model.requires_grad_(False).parameters():
        parameter.data = parameter.data.clone()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_streamed_equals_merged_in_memory(case, dtype, tmp_path):
    make, run, config = CASES[case]
    model, adapted = prepared(tmp_path, make, run, config, dtype)
    report = merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")

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
    brought = {f.name for f in (tmp_path / "out").iterdir()} ^ {f.name for f in (tmp_path / "base").iterdir()}
    assert brought == {"merge_report.json"}
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_nothing_but_the_adapted_tensors_changes_by_a_bit(tmp_path):
    prepared(tmp_path, *FAMILIES["mixtral"][:2], {"target_modules": ["q_proj"]})
    extra = {"old.counter": torch.arange(3), "old.scale": torch.ones(2, dtype=torch.float8_e4m3fn)}
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    file = sorted(set(index["weight_map"].values()))[0]
    save_file({**load_file(tmp_path / "base" / file), **extra}, tmp_path / "base" / file, metadata={"format": "pt"})

    merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    before, after = stored(tmp_path / "base"), stored(tmp_path / "out")
    changed = {key for key in before if not same_bits(before[key], after[key])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    for name in set(index["weight_map"].values()):
        with safe_open(tmp_path / "out" / name, "pt") as new, safe_open(tmp_path / "base" / name, "pt") as old:
            assert set(new.keys()) == set(old.keys())
            assert new.metadata() == old.metadata()
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()


@pytest.mark.parametrize("asked", ["auto", "float32", "float16"])
def test_the_sum_is_taken_in_float32_and_rounded_once(asked, tmp_path):
    model, _ = prepared(tmp_path, *FAMILIES["llama"][:2], {}, torch.bfloat16)
    merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype=asked)
    before, after = stored(tmp_path / "base"), stored(tmp_path / "out")
    dtype = {"auto": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}[asked]
    layers = dict(adapted_layers(model))
    for key, tensor in after.items():
        layer = layers.get(key.removesuffix(".weight"))
        assert tensor.dtype == dtype
        if layer is None:
            assert torch.equal(tensor, before[key].to(dtype)), key
            continue
        delta = layer.lora_B.double() @ layer.lora_A.double() * layer.lora_settings.scale
        exact = before[key].double() + delta
        step = torch.finfo(dtype).eps if dtype != torch.float32 else 4 * torch.finfo(dtype).eps
        assert ((tensor.double() - exact).abs() <= 0.51 * step * exact.abs() + 1e-6).all(), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "target_modules": ["lm_head", "v_proj"]},
        {"init_lora_weights": "pissa"},  # of which the file holds A and B, and W0 alone A0 and B0
    ],
)
def test_an_adapter_of_pefts_own_equals_pefts_merge(options, tmp_path):
    torch.manual_seed(0)
    plain = LLAMA()
    plain.save_pretrained(tmp_path / "base", max_shard_size=SHARD)
    config = peft.LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **options}
    )
    theirs = peft.get_peft_model(plain, config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if "lora_" in name else 0)
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.warns(AdapterWarning, match="notes no fingerprint of its base"):
        report = merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = theirs.merge_and_unload().state_dict()
    opened = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert opened.keys() == merged.keys()
    assert max(relative(opened[key], merged[key]) for key in merged) < 1e-6
    assert not report.base_checked


def test_a_head_that_the_base_lacks_is_written_as_the_task_says(tmp_path):
    torch.manual_seed(0)
    LLAMA().save_pretrained(tmp_path / "base", max_shard_size=SHARD)
    model = tf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=5, pad_token_id=0
    ).eval()
    inject(model, LoRAConfig(r=2, modules_to_save=["score"]))
    save_adapter(stir(model), tmp_path / "adapter", task_type="SEQ_CLS")
    report = merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.new == ["score.weight"]
    opened = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", pad_token_id=0).eval()
    assert type(opened).__name__ == "LlamaForSequenceClassification"
    assert opened.config.num_labels == 5
    assert relative(logits(opened), logits(model)) < 1e-5


def test_a_base_without_the_head_s_prefix_stays_so(tmp_path):
    """A headless BERT's files have no `bert.`; the classifier goes beside them."""
    torch.manual_seed(0)
    tf.BertModel(tf.BertConfig(**BERT)).save_pretrained(tmp_path / "base")
    model = tf.BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    inject(model, LoRAConfig(r=2, modules_to_save=["classifier"]))
    save_adapter(stir(model), tmp_path / "adapter", task_type="SEQ_CLS")
    report = merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.new == ["classifier.weight", "classifier.bias"]
    opened = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert relative(logits(opened), logits(model)) < 1e-5


def test_a_base_that_was_loaded_in_another_dtype_is_still_the_base(tmp_path):
    torch.manual_seed(0)
    LLAMA().save_pretrained(tmp_path / "base")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    inject(model, LoRAConfig(r=2))
    save_adapter(stir(model), tmp_path / "adapter")
    assert merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").base_checked


def test_a_file_beside_shards_is_what_transformers_opens(tmp_path):
    """As it is there, one file goes before shards; and an adapter's config beside the base stays behind."""
    model, adapted = prepared(tmp_path, *FAMILIES["llama"])
    base = tmp_path / "base"
    save_file(stored(base), base / "model.safetensors", metadata={"format": "pt"})
    (base / "adapter_config.json").write_text("{}")
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "merge_report.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert relative(logits(type(model).from_pretrained(tmp_path / "out").eval()), adapted) < 1e-5


def spoil_index(base):
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.gone.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def cut(base):
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])


def change_one(base):
    """One tensor of another base, of the same shape."""
    for shard in base.glob("*.safetensors"):
        tensors = load_file(shard)
        if "model.layers.1.mlp.up_proj.weight" in tensors:
            tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
            save_file(tensors, shard, metadata={"format": "pt"})


def drop_one(base):
    for shard in base.glob("*.safetensors"):
        tensors = load_file(shard)
        if tensors.pop("model.norm.weight", None) is not None:
            save_file(tensors, shard, metadata={"format": "pt"})
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))


def only_pickles(base):
    for path in [*base.glob("*.safetensors"), base / "model.safetensors.index.json"]:
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"x")


def change_adapter(base):
    path = base.parent / "adapter" / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path, metadata=metadata)


def put_twice(base):
    """A tensor of the first shard in the second one too, with other values."""
    first, second = sorted(base.glob("*.safetensors"))[:2]
    key, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), key: tensor + 1}, second, metadata={"format": "pt"})


REFUSED = {
    "a tensor in two shards": (
        put_twice,
        "is in two files of .*00001-of-.* and .*00002-of-.*; .*index.json names .*00001",
    ),
    "another base": (change_one, "made on another base: 1 of .* differ, first model.layers.1.mlp.up_proj.weight"),
    "a torn shard": (cut, "00002-of-.* is not a whole safetensors file"),
    "a shard that is not there": (lambda base: sorted(base.glob("*.safetensors"))[0].unlink(), "no file .*00001-of"),
    "a tensor that no file holds": (spoil_index, "names tensors that no file holds .model.gone.weight"),
    "a base that lacks a tensor": (drop_one, "no values for 1 tensors of LlamaForCausalLM.*model.norm.weight"),
    "pickles only": (only_pickles, "holds neither model.safetensors nor"),
    "no config": (lambda base: (base / "config.json").unlink(), "no file .*config.json"),
    "a quantized base": (
        lambda base: edit(base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantized .gptq.: *.*name the unquantized base|is quantized",
    ),
    "an unknown architecture": (
        lambda base: edit(base / "config.json", architectures=["FooForBar"]),
        "names 'FooForBar', which transformers does not have",
    ),
    "a config of other sizes": (
        lambda base: edit(base / "config.json", intermediate_size=32),
        "expected|config.json describes has",
    ),
    "an adapter that was changed": (change_adapter, "was changed since it was saved"),
    "an adapter that is not there": (lambda base: shutil.rmtree(base.parent / "adapter"), "no folder .*adapter"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused_and_leaves_nothing(name, tmp_path):
    spoil, said = REFUSED[name]
    prepared(tmp_path, *FAMILIES["llama"])
    spoil(tmp_path / "base")
    there = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(LoRAError, match=said):
        merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_another_base_is_allowed_aloud(tmp_path):
    prepared(tmp_path, *FAMILIES["llama"])
    change_one(tmp_path / "base")
    with pytest.warns(AdapterWarning, match=r"another base: 1 of .* differ, first model.layers.1.mlp.up_proj.weight"):
        report = merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", allow_other_base=True)
    assert not report.base_checked
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_full_disk_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    prepared(tmp_path, *FAMILIES["llama"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(free=1000))
    with pytest.raises(LoRAError, match=r"needs about .* and .* has 1\.0 kB free"):
        merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_disk_that_fails_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    prepared(tmp_path, *FAMILIES["llama"])

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(LoRAError, match="no space was left for"):
        merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_folder_in_use_is_left_alone(tmp_path):
    prepared(tmp_path, *FAMILIES["llama"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(LoRAError, match="is not empty"):
        merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


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
