"""What cannot be done is refused before anything has changed, by the layer's name and with what to do."""

import copy
import re
from functools import partial

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm
from torchvision.models import resnet18
from transformers.integrations.bitnet import AutoBitLinear

from lora_lightning import LoRAConfig, LoRAError, inject, merge, save_adapter
from lora_lightning.lora.errors import AdapterError, MergeError, TargetError
from lora_lightning.lora.layers.own_forward import is_plain_linear
from tests.factories import Own, assert_same, bert, llama, snapshot
from tests.lora.kinds import (
    Attended,
    Attention,
    Mixture,
    WithMatrix,
    alone,
    at,
    bare,
    deberta,
    embedding,
    encoder_layer,
    in_parts,
    net,
    shake,
)
from tests.lora.test_families import build


class ReadsItself(nn.Embedding):
    def forward(self, input):
        return self.weight[input]


class Standardized(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean())


class Dropping(nn.Linear):
    def forward(self, x):
        return F.linear(F.dropout(x, 0.5, self.training), self.weight, self.bias)


def one(layer):
    return lambda: nn.Sequential(layer(), nn.Linear(4, 4))


def two_embeddings():
    return nn.ModuleDict({"a": nn.Embedding(3, 2), "b": nn.Embedding(3, 2)})


def another_out_proj():
    model = Attention()
    model.attn.out_proj = nn.Linear(8, 8)
    return model


HALVES = {"of": ["a", "b"], "take": ["a"]}
OF_PARTS = ".* no form for chosen slices yet.*'0'"
OF_BOTH = "an adapter's file has one place .*: name the weights of both in target_parameters"
OF_THE_TABLE = r"'encoder.rel_embeddings': DebertaV2Encoder reads its weight"
REFUSED = [
    # a name that fits nothing
    (net, {"rank_pattern": {"dwn": 2}}, "rank_pattern: no adapted module matches 'dwn'; did you mean 'down'"),
    (net, {"alpha_pattern": {"sqare": 2.0}}, "alpha_pattern: no adapted module matches 'sqare'; did you mean 'square'"),
    (net, {"dropout_pattern": {"upp": 0.1}}, "dropout_pattern: no adapted module matches 'upp'; did you mean 'up'"),
    (bert, at("query", rank_pattern={"key": 2}), "rank_pattern: no adapted module matches 'key'"),  # it is there
    (net, {"layers_to_transform": 3}, "no selected module is in block 3"),
    (bert, at("query", layers_to_transform=[0, 2]), "block 2; blocks there: 0 to 1"),
    (Own, at("first", layers_to_transform=0), "none: no selected module has a number"),
    (net, {"exclude_modules": ["up", "down", "square"]}, "is empty"),
    (lambda: nn.Sequential(nn.LayerNorm(3)), {}, "selects nothing among LayerNorm"),
    (bert, {"target_modules": "query"}, r"no module matches 'query'; .*write \[query\]"),
    (net, {"target_modules": "all-liner"}, "'all-linear'"),
    (net, {"target_modules": ["query-valeu"]}, "'query-value'"),
    (resnet18, {}, r"adaptable by name: conv1, layer1\.0\.conv1"),
    (Mixture, bare("experts.upp"), "target_parameters: no parameter matches 'experts.upp'; did you mean"),
    (in_parts, at("0", slices={"qkv": ["q"]}), "slices: no adapted module matches 'qkv'"),
    (embedding, at(trainable_token_indices={"embed": [1]}), "no module matches 'embed'"),
    # a module that has no form, or would be passed by
    (Own, at("inner"), "'inner' selects 'inner', a ModuleDict, which has no LoRA form"),
    (bert, at("0.attention"), r"adaptable inside it: self\.query, self\.key"),
    (one(lambda: nn.ConvTranspose2d(4, 8, 3)), at("0"), "ConvTranspose2d, which has no LoRA form"),
    (one(lambda: ReadsItself(5, 4)), at("0"), "cannot adapt '0': ReadsItself has a forward of its own"),
    (one(partial(AutoBitLinear, 4, 4, online_quant=True)), at("0"), "'0': AutoBitLinear has a forward of its own"),
    (one(lambda: Standardized(4, 4, 3)), at("0"), "cannot adapt '0': Standardized has a forward of its own"),
    (partial(build, "t5"), at("shared"), "'shared': the model only calls the embed_tokens that share its weight"),
    (another_out_proj, at("out_proj"), r"attn\.out_proj.*reads its weight"),
    (Mixture, bare("proj.bias"), "cannot adapt 'proj.bias': it is torch.float32 of shape"),
    (Own, at("first", modules_to_save=["inner"]), r"'inner' is a ModuleDict, which is never called.*inner\."),
    (llama, at("q_proj", modules_to_save=["model.layers"]), "'model.layers' is a ModuleList, which is never called"),
    (deberta, at("rel_embeddings"), OF_THE_TABLE),
    (deberta, at("query_proj", modules_to_save=["rel_embeddings"]), OF_THE_TABLE),
    (deberta, at(trainable_token_indices={"rel_embeddings": [1]}), OF_THE_TABLE),
    # a thing twice
    (encoder_layer, at("self_attn", target_parameters=["out_proj.weight"]), OF_BOTH + ", or '0.self_attn' and '0.self"),
    (encoder_layer, at("out_proj", target_parameters=["in_proj_weight"]), OF_BOTH + ", or '0.self_attn' and '0.self"),
    (partial(alone, WithMatrix, 6, 5), at("0", target_parameters=["more"]), OF_BOTH + "$"),
    (Mixture, bare("proj.weight") | at("proj"), "share one weight"),
    (net, at("up", "head", modules_to_save=["head"]), "'head' is in modules_to_save"),
    (embedding, at("0", trainable_token_indices=[1]), "selected twice"),
    (embedding, at("2", trainable_token_indices={"0": [1]}) | {"modules_to_save": ["0"]}, "in '0' of modules_to_save"),
    (two_embeddings, at(trainable_token_indices=[1]), "which embedding is the input's cannot be told"),
    (net, {"dropout_pattern": {"u.": 0.1, ".p": 0.2}}, r"dropout_pattern: .* both match 'up'"),
    # a rank, a row or a part that is not there
    (net, at("up", r=13), "r=13 is larger than the layer 'up' allows.*rank_pattern"),
    (one(lambda: nn.Conv1d(4, 8, 1)), at("0", r=5), r"r=5 is larger than the layer '0' allows \(4"),
    (one(lambda: nn.Conv2d(4, 8, 3, groups=4)), at("0"), "'0': it has 4 groups and r=2 is no multiple"),
    (Mixture, bare("up", r=7), r"'experts.up' allows \(6"),
    (in_parts, at("0", r=3, slices={"0": {**HALVES, "sizes": [10, 2], "take": ["b"]}}), r"allows \(2"),
    (embedding, at(trainable_token_indices=[11]), "'0' has rows 0 to 8, got 11"),
    (embedding, at(trainable_token_indices={"2": [1]}), "'2' is a Linear, not an nn.Embedding"),
    (Attention, at("attn", slices={"attn": ["w"]}), "'attn' has the parts q, k, v, got 'w'"),
    (in_parts, at("0", slices={"0": ["q", "v"]}), "the layout of '0' is not known; write it out"),
    (in_parts, at("0", slices={"0": {**HALVES, "sizes": [4, 4]}}), "add up to 8 rows, but its weight has 12"),
    (in_parts, at("0", slices={"0": {"of": list("abcde"), "take": ["a"]}}), "add up to 10 rows"),
    (one(lambda: nn.Conv1d(4, 4, 1)), at("0", slices={"0": HALVES}), "'0', a Conv1d, has no parts"),
    # an option that a kind cannot take
    (Attended, at("attention", use_dora=True), "use_dora: 'attention', a MultiheadAttention, has no"),
    (Attended, at("attention.out_proj", lora_bias=True), "'attention.out_proj', .*, takes no bias on B"),
    (Attended, at("conv", init="pissa"), "made for linear layers; 'conv' is a Conv1d"),
    (Attended, at("attention", init="olora"), "made for linear layers; 'attention' is a Multihead"),
    (Attended, bare("up.weight", use_dora=True), "'up.weight', a bare parameter"),
    (Attended, bare("up.weight", init="pissa"), "'up.weight' is a bare param"),
    (in_parts, at("0", slices={"0": HALVES}, use_dora=True), f"use_dora{OF_PARTS}"),
    (in_parts, at("0", slices={"0": HALVES}, lora_bias=True), f"lora_bias{OF_PARTS}"),
    (in_parts, at("0", slices={"0": HALVES}, init="pissa"), f"init{OF_PARTS}"),
    (lambda: embedding(max_norm=1.0), at("0", use_dora=True), "max_norm, which bounds each row, and DoRA rescales"),
    (Attention, at("attn", dropout=0.5), r"'attn'.*dropout_pattern"),
    (Attention, at("out_proj", dropout=0.5), r"'attn\.out_proj'.*dropout_pattern"),
    (Mixture, bare("up", dropout=0.1), "dropout cannot be honoured"),
    (one(lambda: nn.Linear(4, 4, bias=False)), at("0", bias="lora_only"), "bias to train"),
    (net, {"lora_bias": True}, r"lora_bias: 'down' has no bias for a merge.*exclude_modules=\[\"down\"\]"),
    (net, {"init": "orthogonal", "r": 3}, r"needs an even r, got r=3 \(module 'up'\)"),
]


@pytest.mark.parametrize(("make", "fields", "words"), REFUSED, ids=[words[:60] for _, _, words in REFUSED])
def test_a_refused_injection_says_why_in_one_line_and_leaves_the_model_as_it_was(make, fields, words):
    model = make()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(TargetError, match=words) as caught:
        inject(model, LoRAConfig(**{"r": 2, **fields}))
    assert "\n" not in str(caught.value)
    assert_same(model, before)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.orthogonal, weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_computed_is_refused_by_name_and_left_out_of_all_linear(wrap):
    model = nn.Sequential(nn.Linear(8, 8), wrap(nn.Linear(8, 8)), wrap(nn.Linear(8, 8)), nn.Linear(8, 2))
    with pytest.raises(TargetError, match="cannot adapt '1': its weight is computed"):
        inject(model, LoRAConfig(r=1, target_modules=["1", "2"]))
    report = inject(model, LoRAConfig(r=1))
    assert [row.module for row in report.modules] == ["0"]
    assert "computed" in report.skipped["1"]


def test_what_is_no_plain_module_is_refused():
    with pytest.raises(LoRAError, match="Module, got dict"):
        inject({}, LoRAConfig())
    with pytest.raises(TargetError, match="cannot adapt '0': it is lazy"):
        inject(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)), LoRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(LoRAError, match="another library"):
        inject(peft.get_peft_model(net(), peft.LoraConfig(target_modules=["up"], r=2)), LoRAConfig(r=2))


BROKEN = {
    "lora_A": ({}, "A or B of 'up' is not finite"),
    "lora_B": ({}, "A or B of 'up' is not finite"),
    "lora_magnitude_vector": ({"use_dora": True}, "lora_magnitude_vector of 'up' is not finite"),
    "lora_trained_bias": ({"bias": "all"}, "lora_trained_bias of 'up' is not finite"),
    "lora_B_bias": ({"lora_bias": True, "exclude_modules": ["down"]}, "lora_B_bias of 'up' is not finite"),
    "lora_copy.weight": ({"modules_to_save": ["up"]}, "the copy of 'up' is not finite"),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_finite_is_neither_merged_nor_saved(name, value, tmp_path):
    (options, message), model = BROKEN[name], net()
    inject(model, LoRAConfig(r=2, **options))
    shake(model).get_parameter(f"up.{name}").data.view(-1)[0] = value
    classes = [type(m) for m in model.modules()]
    with pytest.raises(MergeError, match=message):
        merge(model)
    with pytest.raises(AdapterError, match="is not finite"):
        save_adapter(model, tmp_path)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model.down.weight, net().down.weight)
    assert not list(tmp_path.iterdir())


def test_nothing_to_merge_or_save_is_refused_so_that_no_update_counts_twice(tmp_path):
    model = net()
    inject(model, LoRAConfig(r=2))
    merge(shake(model))
    with pytest.raises(MergeError, match="no adapters"):
        merge(model)
    with pytest.raises(AdapterError, match="nothing to save"):
        save_adapter(model, tmp_path)


def gates():
    """Blocks with gates that are narrower than most ranks, one of them under the name of a wide layer."""
    router = nn.ModuleDict({"gate": nn.Linear(16, 2)})
    block = nn.ModuleDict({"shared_expert_gate": nn.Linear(16, 1), "gate": nn.Linear(16, 16), "router": router})
    return nn.ModuleDict({"blocks": nn.ModuleList(copy.deepcopy(block) for _ in range(3))})


def signed():
    return nn.ModuleDict({"a+b (c)": nn.Linear(2, 2), "gate": nn.Linear(8, 8), "head": nn.Linear(8, 2)})


LINES = [
    (gates, "shared_expert_gate", 'rank_pattern={"shared_expert_gate": 1, "router.gate": 2}', [1, 8, 2] * 3),
    (gates, "shared_expert_gate", 'exclude_modules=["shared_expert_gate", "router.gate"]', [8] * 3),
    (signed, "a+b (c)", r'rank_pattern={"a\\+b\\ \\(c\\)": 2}', [2, 8]),
]


@pytest.mark.parametrize(("make", "narrow", "line", "ranks"), LINES)
def test_a_rank_that_layers_do_not_allow_is_answered_with_lines_that_help(make, narrow, line, ranks):
    targets = [narrow, "gate"]
    with pytest.raises(TargetError, match=f"{re.escape(narrow)}' allows .*{re.escape(line)}") as caught:
        inject(make(), LoRAConfig(r=8, target_modules=targets))
    assert make is signed or "nor do 5 more" in str(caught.value)
    report = inject(make(), eval(f"LoRAConfig(r=8, target_modules=targets, {line})"))
    assert [row.r for row in report.modules] == ranks


def test_all_linear_leaves_out_what_is_narrower_than_r_and_says_so():
    report = inject(gates(), LoRAConfig(r=8))
    assert {row.module for row in report.modules} == {f"blocks.{i}.gate" for i in range(3)}
    left = {f"blocks.{i}.{name}" for i in range(3) for name in ("shared_expert_gate", "router.gate")}
    assert {name for name, reason in report.skipped.items() if "r=8 is larger" in reason} == left
    assert all(name in str(report) for name in ("shared_expert_gate", "left out"))
    with pytest.raises(TargetError, match=r"selects nothing .*left out: '0' \(r=8 is larger .*, 4\)"):
        inject(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), LoRAConfig(r=8))


def test_a_linears_own_forward_is_tried_without_its_dropout_and_draws_nothing():
    layer, state = Dropping(64, 8), torch.get_rng_state()
    assert is_plain_linear(layer)
    assert torch.equal(torch.get_rng_state(), state)
