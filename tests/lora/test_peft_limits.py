"""What PEFT reads otherwise is said when an adapter is saved, by the modules' names; our own load reads all of it."""

from __future__ import annotations

import contextlib
import json
import warnings
from functools import partial

import peft
import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from lora_lightning import LoRAConfig, LoRAError, inject, load_adapter, save_adapter
from lora_lightning.lora.errors import AdapterWarning
from lora_lightning.lora.inject import adapted_layers
from tests.factories import FAMILIES, Own, distance, move, output
from tests.lora.kinds import Mixture, alone, at, bare, conv


def deepseek():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    sizes |= {"moe_intermediate_size": 8, "intermediate_size": 24, "vocab_size": 40, "first_k_dense_replace": 1}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **ranks, **experts))


TOKENS, X, IMAGE = torch.arange(1, 7)[None], torch.randn(3, 8), torch.randn(2, 4, 9, 9)
ENCODER, SEQUENCE, OUT = FAMILIES["encoder"].make, torch.randn(2, 5, 16), at("out_proj")
MIXTURE, SIX = partial(alone, Mixture), torch.randn(3, 6)
HEAD = {"modules_to_save": ["head"], "target_modules": ["first"]}
DROPOUTS = {"dropout": 0.1, "dropout_pattern": {"first": 0.3}, "exclude_modules": ["second"]}
CASES = {
    "heads": (Own, X, HEAD, "misses tensors for: 'overhead', 'lm_h"),
    "two places": (Own, X, at("second"), "adapts one place of a module that stands in several: 'second'"),
    "dropouts": (Own, X, DROPOUTS, "'first'"),
    "out_proj": (ENCODER, SEQUENCE, OUT, "0.self_attn.out_p"),
    "out_proj's weight": (
        *(ENCODER, SEQUENCE, bare("0.self_attn.out_proj.weight")),
        r"read and not called: '.*self_attn.out_proj.weight'",
    ),
    "inside": (MIXTURE, SIX, at("proj", target_parameters=["mix"]), "inside a module.*: '0.proj'"),
    "padding": (partial(conv, "2d reflect"), IMAGE, at("1"), "and dilation: '1'"),
    "experts": (deepseek, TOKENS, {}, r"fused experts.*: 'model.layers.0.mlp.gate_proj', 'model.layers.0.mlp.up_proj'"),
}


def build(make):
    torch.manual_seed(1)
    return make().eval()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_limit_of_pefts_is_said_by_name_is_real_and_is_not_ours(tmp_path, name):
    make, x, fields, match = CASES[name]
    model = build(make)
    inject(model, LoRAConfig(r=2, **fields))
    move(model)
    with pytest.warns(AdapterWarning, match=f"^PEFT .*{match}"):
        save_adapter(model, tmp_path)
    wanted = output(model, x)
    ours = build(make)
    load_adapter(ours, tmp_path)
    assert torch.equal(output(ours, x), wanted)
    settings = [[(n, m.lora_settings) for n, m in adapted_layers(found)] for found in (ours, model)]
    assert settings[0] == settings[1]
    try:
        theirs = peft.PeftModel.from_pretrained(build(make), tmp_path).eval()
        if name == "dropouts":
            assert {m.p for m in theirs.modules() if isinstance(m, nn.Dropout)} == {0.1}
        else:
            for module in theirs.modules():
                if isinstance(module, nn.TransformerEncoderLayer):  # else its fused kernel passes adapters by
                    module.register_forward_pre_hook(lambda module, args: None)
            assert distance(output(theirs, x), wanted) > 1e-4
    except (RuntimeError, KeyError) as error:
        assert name == "heads", error  # noqa: PT017


def adapted(**fields):
    model = FAMILIES["bert"].build()
    inject(model, LoRAConfig(**{"r": 2, "target_modules": ["query"], **fields}))
    return move(model)


def test_an_adapter_within_pefts_limits_is_saved_in_silence(tmp_path):
    llama = FAMILIES["llama"].build()
    inject(llama, LoRAConfig(r=2, dropout=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(llama, tmp_path)
        save_adapter(adapted(dropout=0.1, modules_to_save=["classifier"]), tmp_path, task_type="SEQ_CLS")


@pytest.mark.parametrize(
    ("fields", "told"),
    [({"modules_to_save": ["classifier"]}, "SEQ_CLS"), ({}, None), ({"target_modules": ["query", "classifier"]}, None)],
    ids=["in full", "frozen", "adapted"],
)
def test_peft_opens_a_classifiers_adapter_whatever_trains_of_its_head(tmp_path, fields, told):
    model = adapted(**fields)
    with contextlib.nullcontext() if told else pytest.warns(AdapterWarning, match="task_type is left out"):
        save_adapter(model, tmp_path, task_type="SEQ_CLS")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == told
    theirs = peft.PeftModel.from_pretrained(FAMILIES["bert"].build(), tmp_path).eval()
    assert distance(output(theirs, TOKENS), output(model, TOKENS)) < 1e-5


def test_a_task_that_peft_does_not_know_is_refused(tmp_path):
    with pytest.raises(LoRAError, match="got 'SEQ_CLASS'; did you mean 'SEQ_CLS'"):
        save_adapter(adapted(), tmp_path / "out", task_type="SEQ_CLASS")
    assert not (tmp_path / "out").exists()
