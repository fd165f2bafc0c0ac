"""Adapters that PEFT made on real architectures: what is told is what PEFT's own merge changes."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from lora_lightning.commands.analyze import Request, Wanted, analyze

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXT = {**SIZES, "vocab_size": 60, "max_position_embeddings": 32}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FAMILIES = {
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=32)),
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
    ),
    "llama": (
        lambda: LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=1)),
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "task_type": "CAUSAL_LM"},
    ),
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**TEXT, num_key_value_heads=1, num_local_experts=3)),
        {"target_modules": ["q_proj"], "target_parameters": STACKS, "task_type": "CAUSAL_LM"},
    ),
    "bert": (
        lambda: BertForSequenceClassification(BertConfig(**TEXT)),
        {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS", "use_rslora": True},
    ),
    "vit": (
        lambda: ViTForImageClassification(ViTConfig(**SIZES, image_size=32, patch_size=8)),
        {"target_modules": ["projection"]},
    ),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_is_told_is_what_pefts_merge_changes(family, tmp_path):
    make, options = FAMILIES[family]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    cls = type(make())
    theirs = peft.get_peft_model(cls.from_pretrained(tmp_path / "base"), peft.LoraConfig(r=4, lora_alpha=8, **options))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    before = dict(cls.from_pretrained(tmp_path / "base").named_parameters())
    after = dict(theirs.merge_and_unload().named_parameters())
    request = Request(
        adapters=[str(tmp_path / "adapter")],
        output_dir=tmp_path / "out",
        plots=False,
        truncate=0.7,
        wanted=Wanted(base_model=str(tmp_path / "base")),
    )
    found = analyze(request)
    names = [layer.name if layer.name in before else f"{layer.name}.weight" for layer in found.adapters[0].layers]
    changed = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    assert set(names) == changed - {"classifier.weight", "classifier.bias"}
    for name, layer in zip(names, found.adapters[0].layers, strict=True):
        W0, update = before[name].detach().double(), (after[name] - before[name]).detach().double()
        assert math.isclose(layer.norm, float(update.norm()), rel_tol=1e-4)
        assert math.isclose(layer.base.w0_norm, float(W0.norm()), rel_tol=1e-6)
    assert "run" in found.truncation.cost["not_measured"]
