"""A backbone built on the meta device and filled at the start of a fit is the one that was loaded the ordinary way."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lightning import LoRAConfig, LoRAError, huggingface
from lora_lightning.lora.meta.empty_model import fill_from_files, inject_anywhere

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
DECODER = {**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 16}
CAUSAL, VISION = "AutoModelForCausalLM", "AutoModelForImageClassification"
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
IMAGES = {k: v for k, v in SIZES.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4, "num_channels": 3}
RESNET = {"embedding_size": 8, "hidden_sizes": [8], "depths": [2], "layer_type": "basic"}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40}
FAMILIES = {
    "bert": (tf.BertModel, tf.BertConfig(**SIZES), "AutoModelForSequenceClassification"),
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**DECODER), CAUSAL),
    "llama, tied": (tf.LlamaForCausalLM, tf.LlamaConfig(**DECODER, tie_word_embeddings=True), CAUSAL),
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config(**GPT2), CAUSAL),
    "t5": (tf.T5ForConditionalGeneration, tf.T5Config(**T5), "AutoModelForSeq2SeqLM"),
    "vit": (tf.ViTModel, tf.ViTConfig(**IMAGES), VISION),
    "mixtral": (tf.MixtralForCausalLM, tf.MixtralConfig(**DECODER, num_local_experts=4), CAUSAL),
    "resnet": (tf.ResNetModel, tf.ResNetConfig(**RESNET), VISION),
}
LORA = {
    "float32": {"use_dora": True},
    "bfloat16": {"init": "pissa_niter_4"},
    "float16": {"init": "kaiming", "bias": "all"},
}
OWN = {
    "bert": {"modules_to_save": ["classifier"]},
    "vit": {"modules_to_save": ["classifier"]},
    "llama": {"modules_to_save": ["lm_head"], "bias": "none"},
    "llama, tied": {"trainable_token_indices": [3, 5], "bias": "none"},
    "t5": {"bias": "none"},
    "mixtral": {"target_parameters": ["experts.gate_up_proj"], "use_dora": False, "init": "gaussian", "bias": "none"},
    "resnet": {"target_modules": ["convolution"], "modules_to_save": ["classifier"], "init": "gaussian"},
}


def saved(name, folder, **kwargs):
    torch.manual_seed(1)
    make, config, _ = FAMILIES[name]
    make(copy.deepcopy(config)).save_pretrained(folder, **kwargs)
    return folder


def built(folder, auto_class, lora, *, on_meta, dtype="float32"):
    """The adapted backbone and torch's random state afterwards."""
    torch.manual_seed(2)
    model = huggingface(str(folder), auto_class, dtype=dtype, on_meta=on_meta)
    inject_anywhere(model, lora)
    return model, torch.get_rng_state()


def assert_same_model(got, wanted):
    """Every tensor, parameter or buffer, saved or not; ties, modes, and what trains."""
    for kind in ("named_parameters", "named_buffers"):
        one, other = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (got, wanted))
        assert list(one) == list(other)
        for name, tensor in other.items():
            assert one[name].dtype == tensor.dtype, name
            assert torch.equal(one[name], tensor), name
            assert one[name].requires_grad == tensor.requires_grad, name
    assert ties(got) == ties(wanted)
    assert got.training == wanted.training
    assert got.new_keys == wanted.new_keys


def ties(model):
    names = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return sorted(group for group in names.values() if len(group) > 1)


@pytest.mark.parametrize("dtype", list(LORA))
@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_filled_model_is_the_loaded_one_to_the_bit(tmp_path, name, dtype):
    *_, auto_class = FAMILIES[name]
    saved(name, tmp_path, max_shard_size="8KB" if dtype == "float32" else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or dtype != "float32"
    lora = LoRAConfig(r=2, **{**LORA[dtype], **OWN.get(name, {})})
    wanted, random = built(tmp_path, auto_class, lora, on_meta=False, dtype=dtype)
    got, same = built(tmp_path, auto_class, lora, on_meta=True, dtype=dtype)
    assert torch.equal(random, same)  # so that what is drawn next is the same too
    trains = [p for p in got.parameters() if p.requires_grad]
    assert trains
    assert not any(p.is_meta for p in trains)
    assert sum(p.is_meta for p in got.parameters()) > 5
    assert not any(buffer.is_meta for name, buffer in got.named_buffers() if name not in got.state_dict())
    assert fill_from_files(got) > 5
    assert_same_model(got, wanted)
    assert fill_from_files(got) == 0


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_a_tie_that_files_hold_twice_is_tied_where_both_are_the_same(tmp_path, change):
    saved("llama, tied", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")  # the tensor under a second name too, as older files have it
    names = {"model.embed_tokens.weight", "lm_head.weight"}
    ((there, lacking),) = ([one, *names - {one}] for one in names & tensors.keys())
    tensors[lacking] = tensors[there].clone()
    tensors[lacking][-1, -1] += change
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    wanted, _ = built(tmp_path, CAUSAL, LoRAConfig(r=2), on_meta=False)
    got, _ = built(tmp_path, CAUSAL, LoRAConfig(r=2), on_meta=True)
    assert bool(ties(got)) == (change == 0)
    fill_from_files(got)
    assert_same_model(got, wanted)
    assert got.all_tied_weights_keys == wanted.all_tied_weights_keys


def test_a_new_head_and_one_of_another_size_are_drawn_as_ever(tmp_path):
    tf.BertForSequenceClassification(tf.BertConfig(**SIZES, num_labels=3)).save_pretrained(tmp_path)
    models = []
    for on_meta in (False, True):
        torch.manual_seed(4)
        models.append(huggingface(str(tmp_path), num_labels=2, on_meta=on_meta))
    assert not models[1].classifier.weight.is_meta
    fill_from_files(models[1])
    assert_same_model(models[1], models[0])
    assert models[1].new_keys == ["classifier.bias", "classifier.weight"]


def test_what_cannot_be_filled_is_refused_by_name(tmp_path, tiny):
    with pytest.raises(LoRAError, match="goes with no random_weights"):
        huggingface(tiny.bert, random_weights=True, on_meta=True)
    with pytest.raises(LoRAError, match="goes with no device_map"):
        huggingface(tiny.bert, on_meta=True, model_kwargs={"device_map": "cpu"})
    short = saved("bert", tmp_path / "short")
    text = (short / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    (short / "config.json").write_text(text)
    with pytest.raises(LoRAError, match=r"encoder\.layer\.2"):
        huggingface(str(short), on_meta=True)
    saved("bert", tmp_path)  # pickled weights, and files that are unknown or go in between
    model, _ = built(tmp_path, "AutoModel", LoRAConfig(r=2), on_meta=True)
    file, before = tmp_path / "model.safetensors", [t.is_meta for t in model.state_dict().values()]
    torch.save(load_file(file), tmp_path / "pytorch_model.bin")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(LoRAError, match="download it again"):
        fill_from_files(model)
    assert [t.is_meta for t in model.state_dict().values()] == before
    file.unlink()
    with pytest.raises(LoRAError, match="safetensors"):
        huggingface(str(tmp_path), on_meta=True)
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(LoRAError, match="not known where its weights lie"):
        fill_from_files(model)
