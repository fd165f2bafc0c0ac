"""PEFT's directories in all the forms in which they come: ties, raw keys, other heads, patterns in doubt."""

from __future__ import annotations

import itertools
import json
from functools import partial

import peft
import pytest
import safetensors.torch
import torch
from transformers import LlamaModel

from lora_lightning import load_adapter, save_adapter
from lora_lightning.lora.errors import AdapterWarning
from lora_lightning.lora.formats.peft.config import CONFIG, FIELDS, WEIGHTS
from tests.factories import distance, hf, llama, output
from tests.lora import directories
from tests.lora.directories import edit_config, rename
from tests.lora.kinds import GROUPED

TOKENS = torch.arange(1, 7)[None]
pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings", "ignore:You have requested"
)


def build(**changes):
    torch.manual_seed(1)
    return llama(**changes).double().eval()


def of_peft(directory, model=None, **fields):
    return directories.of_peft(directory, build() if model is None else model, **fields)


def refused(directory, match, model=None, **options):
    directories.refused(directory, match, build() if model is None else model, **options)


def loads_as(theirs, directory, ours=None, **options):
    """Our model of PEFT's directory, which computes as PEFT's, and as it does again from a directory of ours."""
    ours = build() if ours is None else ours
    again = type(ours)(ours.config).to(ours.dtype).eval()
    again.load_state_dict(ours.state_dict())
    report = load_adapter(ours, directory, **options)
    assert distance(output(ours, TOKENS), output(theirs, TOKENS)) < 1e-12
    load_adapter(again, save_adapter(ours, directory / "ours"))
    assert torch.equal(output(again, TOKENS), output(ours, TOKENS))
    return ours, report


# ---- tied embeddings


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"], ".*(embed_tokens|q_proj)"])
def test_one_update_of_a_tied_pair_is_refused(tmp_path, targets, tied):
    of_peft(tmp_path, build(tie_word_embeddings=True), target_modules=targets, ensure_weight_tying=True)
    ours = build(tie_word_embeddings=tied)
    ours.load_state_dict(build(tie_word_embeddings=True).state_dict())
    refused(tmp_path, "ensure_weight_tying trained one update for two layers", ours)


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]])
@pytest.mark.parametrize("tied", [False, True])
def test_one_copy_of_a_tied_pair_is_loaded_into_both(tmp_path, saved, tied):
    theirs = of_peft(tmp_path, build(tie_word_embeddings=tied), modules_to_save=saved, ensure_weight_tying=True)
    ours, report = loads_as(theirs, tmp_path, build(tie_word_embeddings=tied))
    if tied:
        assert report.saved.keys() == {"model.embed_tokens", "lm_head"}
        assert ours.lm_head.lora_copy.weight is ours.model.embed_tokens.lora_copy.weight


@pytest.mark.parametrize("indices", [[3, 1], {"embed_tokens": [3, 1]}])
@pytest.mark.parametrize("ensure", [False, True])
def test_token_rows_of_a_tied_pair_reach_both(tmp_path, indices, ensure):
    model = build(tie_word_embeddings=True)
    theirs = of_peft(tmp_path, model, trainable_token_indices=indices, ensure_weight_tying=ensure)
    loads_as(theirs, tmp_path, build(tie_word_embeddings=True))
    edit_config(tmp_path, trainable_token_indices={"embed_tokens": [3, 1], "lm_head": [3, 1]})
    refused(tmp_path, "trainable_token_indices 'lm_head'.*leave that entry out", build(tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("targets", "tied"),
    [(["q_proj"], False), (["q_proj", "embed_tokens"], False), *((["q_proj", "lm_head"], t) for t in (False, True))],
)
def test_pefts_copies_of_embeddings_are_checked_against_w0_and_left(tmp_path, targets, tied):
    theirs = of_peft(tmp_path, build(tie_word_embeddings=tied), target_modules=targets)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert [key for key in safetensors.torch.load_file(tmp_path / WEIGHTS) if "lora_" not in key]
    loads_as(theirs, tmp_path, build(tie_word_embeddings=tied))
    resized, other = build(tie_word_embeddings=tied), build(tie_word_embeddings=tied)
    resized.resize_token_embeddings(44)
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1)
        other.lm_head.weight.add_(1)
    for model in (resized, other):
        refused(tmp_path, "holds a weight of '.*' that is not this model's: load the base .* .resized as it was", model)
    load_adapter(other, tmp_path, allow_other_base=True)


# ---- keys


def test_a_raw_state_dict_of_a_peft_model_loads(tmp_path):
    fields = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "use_dora": True}
    theirs = of_peft(tmp_path, **fields)
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in state
    safetensors.torch.save_file(state, tmp_path / WEIGHTS)
    loads_as(theirs, tmp_path)
    state = {k.replace(".default.", ".other.") if "lora_A" in k else k: v for k, v in state.items()}
    safetensors.torch.save_file(state, tmp_path / WEIGHTS)
    refused(tmp_path, r"the file holds 2 adapters \(default, other\)")


RAW = {"lora_A.weight": "lora_A.x.weight", "lora_B.weight": "lora_B.x.weight", "tokens_delta": "tokens_delta.x"}
SPELLINGS = {
    "raw token rows": lambda key: next(key.removesuffix(a) + b for a, b in RAW.items() if key.endswith(a)),
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.", 1),
    "sharded": lambda key: key.replace("self_attn.", "_fsdp_wrapped_module.self_attn._checkpoint_wrapped_module.", 1),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_keys_in_raw_form_and_wrappers_within_them_are_seen_through(tmp_path, spelling):
    theirs = of_peft(tmp_path, trainable_token_indices=[3, 1])
    rename(tmp_path, SPELLINGS[spelling])
    loads_as(theirs, tmp_path)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT", "ignore:Already found a `peft_config`")
def test_a_peft_model_wrapped_twice_loads(tmp_path):
    first = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["q_proj"]))
    theirs = of_peft(tmp_path, first, target_modules=["q_proj", "v_proj"])
    keys = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert all(key.startswith("base_model.model.base_model.model.model.layers") for key in keys)
    loads_as(theirs, tmp_path)


def test_an_adapter_of_the_whole_model_says_where_it_belongs(tmp_path):
    of_peft(tmp_path / "whole", target_modules=["q_proj", "lm_head"])
    backbone = LlamaModel(build().config).double()
    refused(tmp_path / "whole", "made on a larger model that holds this one as 'model'", backbone)
    of_peft(tmp_path / "part", backbone)
    match = r"made on the part 'model' of this model: load it into model.get_submodule\('model'\)"
    refused(tmp_path / "part", match)
    load_adapter(build().get_submodule("model"), tmp_path / "part")


def test_experts_of_transformers_4_go_by_way_of_peft_which_fuses_them(tmp_path):
    mixtral = partial(hf, "MixtralForCausalLM", **{**GROUPED, "intermediate_size": 24}, num_local_experts=2)
    tensors = {}
    for expert, (name, out, width) in itertools.product("01", [("w1", 24, 16), ("w3", 24, 16), ("w2", 16, 24)]):
        key = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{name}"
        tensors |= {f"{key}.lora_A.weight": torch.randn(2, width), f"{key}.lora_B.weight": torch.randn(out, 2)}
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["w1", "w2", "w3"]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    refused(tmp_path, "experts are apart, as before transformers 5: load it in PEFT, which fuses them", mixtral())
    theirs = peft.PeftModel.from_pretrained(mixtral(), tmp_path).eval()
    theirs.save_pretrained(tmp_path / "fused")
    ours = mixtral()
    load_adapter(ours, tmp_path / "fused")
    assert distance(output(ours, TOKENS), output(theirs, TOKENS)) < 1e-6


# ---- settings


def test_other_methods_and_settings_without_a_counterpart_are_refused_by_name(tmp_path):
    of_peft(tmp_path)
    config = (tmp_path / CONFIG).read_text()
    for method in ("ADALORA", "IA3", "LOHA", "OFT", "PROMPT_TUNING", "VERA", "SOMETHING"):
        edit_config(tmp_path, peft_type=method)
        refused(tmp_path, rf"\(peft_type LORA\), got '{method}'$")
        assert method == "SOMETHING" or method in set(peft.PeftType)
    for setting, does in ((name, rule) for name, rule in FIELDS.items() if isinstance(rule, str)):
        (tmp_path / CONFIG).write_text(config)
        assert setting in peft.LoraConfig.__dataclass_fields__
        edit_config(tmp_path, **{setting: [[0, 1]] if setting != "use_qalora" else True})
        refused(tmp_path, rf"{setting}=.* {does[:20]}")
    (tmp_path / CONFIG).write_text(config)
    for start in ("corda", "lora_ga", "loftq", "pissa_niter_4"):
        edit_config(tmp_path, init_lora_weights=start)
        refused(tmp_path, f"init_lora_weights '{start}', which changed the base")


def test_every_field_of_pefts_is_known_and_others_are_announced(tmp_path):
    of_peft(tmp_path)
    assert set(peft.LoraConfig.__dataclass_fields__) <= {*FIELDS}
    edit_config(tmp_path, **{name: 1 for name, rule in FIELDS.items() if rule is None and name != "peft_type"})
    with pytest.warns(AdapterWarning) as said:
        load_adapter(build(), tmp_path)
    assert not [warning for warning in said if "unknown" in str(warning.message)]
    edit_config(tmp_path, sparkle=0.5, nothing=None)
    with pytest.warns(AdapterWarning, match="settings that are unknown here and not used: sparkle=0.5$"):
        load_adapter(build(), tmp_path)


# ---- patterns

DOUBT = {"q_proj": 3, "0.self_attn.q_proj": 7}
NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("order", [list(DOUBT), list(reversed(DOUBT))])
def test_an_alpha_that_the_file_leaves_in_doubt_is_asked_for(tmp_path, order):
    theirs = of_peft(tmp_path, alpha_pattern={key: DOUBT[key] for key in order}, target_modules=["q_proj", "v_proj"])
    match = rf"'0.self_attn.q_proj' \(7\) and 'q_proj' \(3\) match '{NAME}'; PEFT trained with the one that was"
    refused(tmp_path, match)
    ours = build()
    load_adapter(ours, tmp_path, alphas={NAME: DOUBT[order[1]]})
    assert distance(output(ours, TOKENS), output(theirs, TOKENS)) > 1e-4
    loads_as(theirs, tmp_path, alphas={NAME: DOUBT[order[0]]})
    refused(tmp_path, "no module 'layers.0.self_attn.q_proj'; did you mean", alphas={NAME[6:]: 3})
    refused(tmp_path, "leaves no doubt about 'model.layers.1", alphas={NAME: 3, NAME.replace("0", "1"): 3})


def test_ranks_are_the_tensors_whatever_the_order_and_tell_the_likelier_alpha(tmp_path):
    theirs = of_peft(
        tmp_path, rank_pattern={"q_proj": 3, "0.self_attn.q_proj": 4}, alpha_pattern=dict.fromkeys(DOUBT, 3)
    )
    _, report = loads_as(theirs, tmp_path)  # equal alphas are in no doubt
    assert {row.r for row in report.modules} == {3}
    of_peft(tmp_path, rank_pattern={"q_proj": 3, "0.self_attn.q_proj": 4}, alpha_pattern=DOUBT)
    refused(tmp_path, "in rank_pattern 'q_proj' won, by the tensors' rank")


def test_a_rank_that_no_order_of_the_config_gives_is_refused(tmp_path):
    of_peft(tmp_path, rank_pattern={"0.self_attn.q_proj": 4})
    edit_config(tmp_path, rank_pattern={"0.self_attn.q_proj": 8})
    refused(tmp_path, f"'{NAME}': lora_A has a shape of rank 4, and {CONFIG} says 8")
    edit_config(tmp_path, rank_pattern={}, r=16)
    refused(tmp_path, "shape of rank 4, and .* says 16")
