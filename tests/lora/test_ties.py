"""Tied weights: adapted, saved in full and merged without a silent double, through transformers' own saving."""

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lora_lightning import LoRAConfig, inject, load_adapter, merge, remove, save_adapter
from lora_lightning.lora.frozen.fingerprint import fingerprint
from tests.factories import hf
from tests.factories import llama as tiny_llama
from tests.lora.kinds import ONE_BLOCK, bart, shake, t5

IDS = torch.tensor([[1, 5, 3, 9], [2, 2, 7, 0]])


def llama():
    torch.manual_seed(0)
    return tiny_llama(tie_word_embeddings=True, attn_implementation="sdpa").eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


# What is adapted or saved, and the modules that have their own weight after the merge.
CASES = {
    "head adapted": ({"target_modules": ["lm_head", "q_proj"]}, ["lm_head"]),
    "head saved": ({"modules_to_save": ["lm_head"]}, ["lm_head"]),
    "table saved": ({"modules_to_save": ["embed_tokens"]}, ["model.embed_tokens"]),
    "both saved": ({"modules_to_save": ["embed_tokens", "lm_head"]}, []),
    "head adapted, table saved": (
        {"target_modules": ["lm_head", "q_proj"], "modules_to_save": ["embed_tokens"]},
        ["model.embed_tokens", "lm_head"],
    ),
    "table adapted": ({"target_modules": ["embed_tokens"]}, ["model.embed_tokens"]),
    "rows saved": ({"trainable_token_indices": [1, 5]}, []),
    "neither": ({}, []),
}


def adapted(case):
    model = llama()
    inject(model, LoRAConfig(r=2, **CASES[case][0]))
    return model


@pytest.mark.parametrize("case", CASES)
def test_merged_equals_adapted_and_survives_save_pretrained(case, tmp_path):
    model, plain = adapted(case), logits(llama())
    if case == "both saved":
        assert model.model.embed_tokens.lora_copy.weight is model.lm_head.lora_copy.weight
    assert torch.equal(logits(model), plain), "a fresh adapter changes nothing"
    w0 = fingerprint(shake(model))
    assert not [name for name in w0.differences(fingerprint(llama())) if name in w0.tensors], "W0 never moves"
    expected, ours = logits(model), llama()
    load_adapter(ours, save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(logits(ours), expected)
    theirs = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-6)
    remove(ours)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert ours.config.tie_word_embeddings
    assert torch.equal(logits(ours), plain)

    half = copy.deepcopy(model)
    untied = merge(half, dtype=torch.bfloat16).untied
    assert (half.lm_head.weight is half.model.embed_tokens.weight) == (not untied)
    assert merge(model).untied == untied
    assert sorted(untied) == sorted(CASES[case][1])
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert model.config.tie_word_embeddings == (not untied)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    again.tie_weights()
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_a_half_precision_copy_with_a_tie_inside_computes_as_merged():
    block = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    block[1].weight = block[0].weight
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 4), block).bfloat16(), torch.ones(2, 4).bfloat16()
    inject(model, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    expected = shake(model)[1](x)
    merge(model)
    assert torch.equal(block(x), expected)


def test_tied_modules_that_peft_trained_apart_load_apart(tmp_path):
    settings = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    theirs = shake(get_peft_model(llama(), LoraConfig(**settings)).eval())
    theirs.save_pretrained(tmp_path)
    ours = llama()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)
    report = merge(ours)
    assert sorted(report.untied) == ["lm_head", "model.embed_tokens"]
    assert not ours.config.tie_word_embeddings
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)


def run_seq2seq(model):
    with torch.no_grad():
        return model(input_ids=IDS, decoder_input_ids=IDS).logits


BERT = {**ONE_BLOCK, "vocab_size": 40, "max_position_embeddings": 16, "pad_token_id": 0}
bert = partial(hf, "BertForMaskedLM", **BERT)
DECODER = {"target_modules": ["query", "cls.predictions.decoder"]}


@pytest.mark.parametrize(
    ("make", "run", "options", "unties"),
    [
        *[
            (make, run_seq2seq, options, True)
            for make in (t5, bart)
            for options in ({"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]})
        ],
        (bert, logits, {"bias": "all"}, False),
        (bert, logits, {"bias": "all", **DECODER}, True),
    ],
)
def test_models_with_several_ties_survive_save_pretrained(make, run, options, unties, tmp_path):
    model = make().eval()
    inject(model, LoRAConfig(r=2, **options))
    if make is bert:
        assert model.cls.predictions.lora_trained_bias is model.cls.predictions.decoder.lora_trained_bias
    expected = run(shake(model))
    assert bool(merge(model).untied) == unties
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(run(type(model).from_pretrained(tmp_path).eval()), expected, rtol=1e-5, atol=1e-6)
