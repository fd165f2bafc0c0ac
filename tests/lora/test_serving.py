"""`save_adapter(serving="vllm")`, read by a reader written from vLLM's own code and from nothing of ours."""

from __future__ import annotations

import copy
import json
import math
import warnings
from functools import partial

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

from lora_lightning import LoRAConfig, inject, load_adapter, save_adapter
from lora_lightning.lora.errors import AdapterError, AdapterWarning
from tests.factories import FAMILIES, bert, distance, gpt, hf, llama, move, output
from tests.lora.bank_support import gpt2
from tests.lora.directories import same_files

TOKENS = torch.arange(1, 7)[None]


PHI3 = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
phi3 = partial(hf, "Phi3ForCausalLM", **PHI3, intermediate_size=24, vocab_size=40, pad_token_id=0)
MAKERS = {"llama": llama, "phi3": phi3, "gpt": gpt, "bert": bert}
FIELDS = {
    "plain": ("llama", {}),
    "ranks": ("llama", {"rank_pattern": {"q_proj": 4, "0.mlp.up_proj": 1}, "alpha_pattern": {"v_proj": 3.0}}),
    "rslora": ("llama", {"use_rslora": True, "rank_pattern": {"down_proj": 5}}),
    "pissa": ("llama", {"init": "pissa", "target_modules": ["q_proj", "down_proj"]}),
    "olora": ("bert", {"init": "olora", "target_modules": ["query", "key"], "rank_pattern": {"key": 2}}),
    "slices": ("phi3", {"slices": {"qkv_proj": ["q", "v"]}, "rank_pattern": {"o_proj": 5}}),
    "slices by head": ("gpt", {"slices": {"query_key_value": ["v"]}, "alpha_pattern": {"dense": 0.3}}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "regex": ("llama", {"target_modules": r".*0\.self_attn\.q_proj"}),
}


def build(maker, dtype=torch.float64):
    torch.manual_seed(1)
    return MAKERS[maker]().to(dtype).eval()


def trained(maker, dtype=torch.float64, **fields):
    model = build(maker, dtype)
    inject(model, LoRAConfig(**{"r": 3, "alpha": 6.0, **fields}))
    return move(model)


@torch.no_grad()
def served(plain, directory):
    """What vLLM computes: `parse_fine_tuned_lora_name`, `PEFTHelper` and `optimize` in a few lines."""
    config = json.loads((directory / "adapter_config.json").read_text())
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    assert config["bias"] == "none"
    assert isinstance(config["lora_alpha"], int)
    assert isinstance(config["target_modules"], list)
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    pairs = {}
    for key, tensor in safetensors.torch.load_file(directory / "adapter_model.safetensors").items():
        *module, side, weight = key.removeprefix("base_model.model.").split(".")
        assert key.startswith("base_model.model.")
        assert (side in ("lora_A", "lora_B"), weight) == (True, "weight")
        assert module[-1] in {name.split(".")[-1] for name in config["target_modules"]}
        pairs.setdefault(".".join(module), {})[side] = tensor.double()
    model = copy.deepcopy(plain)
    for name, pair in pairs.items():
        assert pair["lora_A"].shape[0] == pair["lora_B"].shape[1] == config["r"]
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        module.weight = nn.Parameter(module.weight + (scale * pair["lora_B"]) @ pair["lora_A"])
    return model


@pytest.mark.filterwarnings("ignore:rank")
@pytest.mark.parametrize("name", FIELDS)
def test_one_rank_and_one_alpha_compute_what_was_trained(tmp_path, name):
    maker, fields = FIELDS[name]
    plain, model = build(maker), trained(maker, **fields)
    wanted = output(model, TOKENS)
    assert distance(output(plain, TOKENS), wanted) > 1e-4
    save_adapter(model, tmp_path, serving="vllm")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not any(config[field] for field in ("rank_pattern", "alpha_pattern", "use_rslora"))
    assert distance(output(served(plain, tmp_path), TOKENS), wanted) < 1e-12
    theirs = peft.PeftModel.from_pretrained(build(maker), tmp_path, autocast_adapter_dtype=False).eval()
    assert distance(output(theirs, TOKENS), wanted) < 1e-12
    again = build(maker)
    load_adapter(again, tmp_path)
    assert distance(output(again, TOKENS), wanted) < 1e-12
    save_adapter(again, tmp_path / "again", serving="vllm")
    assert same_files(tmp_path / "again", tmp_path)


def fcs():
    return nn.ModuleDict({"fc": nn.Linear(4, 4), "deep": nn.ModuleDict({"fc": nn.Linear(4, 4)})})


REFUSED = {
    "DoRA": ("llama", {"use_dora": True}, r"DoRA: .*q_proj"),
    "lora_bias": ("llama", {"lora_bias": True}, "a bias on"),
    "biases": ("bert", {"target_modules": ["query"], "bias": "all"}, "trained biases: bert"),
    "head": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}, "modules_to_save.: classifier"),
    "rows": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "token rows: model.embed_tokens"),
    "embedding": ("llama", {"target_modules": ["embed_tokens"]}, "adapter on Embedding: model.embed_tokens"),
    "parameter": (
        *("llama", {"target_modules": [], "target_parameters": ["0.mlp.up_proj.weight"]}),
        r"adapter on .*: model.layers.0.mlp.up_proj.weight",
    ),
    "attention": (
        *(FAMILIES["encoder"].build, {"target_modules": ["out_proj"]}),
        "adapter in nn.MultiheadAttention: layers.0.self_attn.out_proj",
    ),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(4, 4, 3)), {"target_modules": ["0"]}, "adapter on Conv1d: 0"),
    "Conv1D": (gpt2, {}, r"adapter on Conv1D: transformer\.h\.0\.attn\.c_attn"),
    "a name that ends another": (fcs, {"target_modules": "fc"}, "'fc' is adapted and 'deep.fc', whose name ends in it"),
    "rank": ("llama", {"rank_pattern": {"q_proj": 600}}, "vLLM serves ranks up to 512 and this adapter's is 600"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_cannot_serve_is_refused_by_name_and_writes_nothing(tmp_path, name):
    make, fields, match = REFUSED[name]
    model = build(make) if make in MAKERS else make()
    inject(model, LoRAConfig(**{"r": 2, **fields}), any_rank=True)
    with pytest.raises(AdapterError, match="serving must be 'vllm' or left out, got 'tgi'"):
        save_adapter(model, tmp_path / "x", serving="tgi")
    with pytest.raises(AdapterError, match=match):
        save_adapter(model, tmp_path / "x", serving="vllm")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("r", "said"), [(8, None), (16, None), (17, 32), (64, 64), (65, 128), (257, 320), (512, 512)])
def test_ranks_above_vllms_default_are_announced_with_the_flag(tmp_path, r, said):
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, LoRAConfig(r=r, target_modules=["0"]), any_rank=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_adapter(model, tmp_path, serving="vllm")
    found = [str(w.message) for w in caught if w.category is AdapterWarning]
    assert found == ([f"rank {r}: start vLLM with --max-lora-rank {said} (its default is 16)"] if said else [])
