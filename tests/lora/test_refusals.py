"""What cannot be done is refused before anything has changed, by the layer's name and with what to do."""

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

from lora_lightning import LoRAConfig, LoRAError, inject, merge, save_adapter
from lora_lightning.lora.errors import AdapterError, MergeError, TargetError
from lora_lightning.lora.layers import KINDS, LoRALinear
from tests.factories import Own, assert_same, bert, llama, snapshot
from tests.lora.kinds import Attended, Attention, Mixture, embedding, in_parts, net, shake


class ReadsItself(nn.Embedding):
    def forward(self, input):
        return self.weight[input]


class Standardized(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean())


class Odd(nn.Linear):
    """A base class of a kind that has no option."""


class LoRAOdd(LoRALinear):
    kind, dora_dim, has_lora_bias, has_inits = "Odd", None, False, False


def odd():
    return nn.Sequential(nn.Linear(4, 4), Odd(4, 4))


def one(layer):
    return lambda: nn.Sequential(layer(), nn.Linear(4, 4))


def two_embeddings():
    return nn.ModuleDict({"a": nn.Embedding(3, 2), "b": nn.Embedding(3, 2)})


def another_out_proj():
    model = Attention()
    model.attn.out_proj = nn.Linear(8, 8)
    return model


def named(*names, **fields):
    return {"target_modules": [*names], **fields}


def bare(*names, **fields):
    return {"target_modules": [], "target_parameters": [*names], **fields}


def rows(wanted, *names):
    return {"target_modules": [*names], "trainable_token_indices": wanted}


HALVES = {"of": ["a", "b"], "take": ["a"]}
REFUSED = [
    # a name that fits nothing
    (net, named("upp"), "target_modules: no module matches 'upp'; did you mean 'up'"),
    (net, {"exclude_modules": ["hed"]}, "exclude_modules: no module matches 'hed'; did you mean 'head'"),
    (net, {"modules_to_save": ["haed"]}, "modules_to_save: no module matches 'haed'; did you mean 'head'"),
    (net, {"rank_pattern": {"dwn": 2}}, "rank_pattern: no adapted module matches 'dwn'; did you mean 'down'"),
    (net, {"alpha_pattern": {"sqare": 2.0}}, "alpha_pattern: no adapted module matches 'sqare'; did you mean 'square'"),
    (net, {"dropout_pattern": {"upp": 0.1}}, "dropout_pattern: no adapted module matches 'upp'; did you mean 'up'"),
    (net, {"dropout_pattern": {"norm": 0.1}}, "dropout_pattern: no adapted module matches 'norm'"),
    (bert, named("query", rank_pattern={"key": 2}), "rank_pattern: no adapted module matches 'key'"),  # it is there
    (net, {"layers_to_transform": 3}, "no selected module is in block 3"),
    (bert, named("query", layers_to_transform=[0, 2]), "block 2; blocks there: 0 to 1"),
    (Own, named("first", layers_to_transform=0), "none: no selected module has a number"),
    (net, {"exclude_modules": ["up", "down", "square"]}, "is empty"),
    (one(lambda: nn.LayerNorm(3)), named("0"), "which has no LoRA form"),
    (lambda: nn.Sequential(nn.LayerNorm(3)), {}, "selects nothing among LayerNorm"),
    (bert, {"target_modules": "query"}, r"no module matches 'query'; .*write \[query\]"),
    (Own, named("ead"), "no module matches 'ead'"),
    (Mixture, bare("experts.upp"), "target_parameters: no parameter matches 'experts.upp'; did you mean"),
    (in_parts, named("0", slices={"qkv": ["q"]}), "slices: no adapted module matches 'qkv'"),
    (embedding, rows({"embed": [1]}), "no module matches 'embed'"),
    # a module that has no form, or would be passed by
    (Own, named("norm"), "'norm' selects 'norm', a LayerNorm, which has no LoRA form"),
    (Own, named("inner"), "'inner' selects 'inner', a ModuleDict, which has no LoRA form"),
    (bert, named("LayerNorm"), "'LayerNorm' selects '.*LayerNorm', a LayerNorm, which has no LoRA form"),
    (bert, named("0.attention"), r"adaptable inside it: self\.query, self\.key"),
    (one(lambda: nn.ConvTranspose2d(4, 8, 3)), named("0"), "ConvTranspose2d, which has no LoRA form"),
    (one(lambda: ReadsItself(5, 4)), named("0"), "cannot adapt '0': ReadsItself has a forward of its own"),
    (one(lambda: Standardized(4, 4, 3)), named("0"), "cannot adapt '0': Standardized has a forward of its own"),
    (another_out_proj, named("out_proj"), r"attn\.out_proj.*reads its weight"),
    (Mixture, bare("proj.bias"), "cannot adapt 'proj.bias': it is torch.float32 of shape"),
    (Own, named("first", modules_to_save=["inner"]), r"'inner' is a ModuleDict, which is never called.*inner\."),
    (llama, named("q_proj", modules_to_save=["model.layers"]), "'model.layers' is a ModuleList, which is never called"),
    # a thing twice
    (Mixture, bare("proj.weight") | named("proj"), "share one weight"),
    (net, named("up", "head", modules_to_save=["head"]), "'head' is in modules_to_save"),
    (embedding, rows([1], "0"), "selected twice"),
    (embedding, rows({"0": [1]}, "2") | {"modules_to_save": ["0"]}, "in '0' of modules_to_save"),
    (two_embeddings, rows([1]), "which embedding is the input's cannot be told"),
    (net, {"dropout_pattern": {"u.": 0.1, ".p": 0.2}}, r"dropout_pattern: .* both match 'up'"),
    # a rank, a row or a part that is not there
    (net, named("up", r=13), "r=13 is larger than the layer 'up' allows.*rank_pattern"),
    (net, {"rank_pattern": {"down": 11}}, "r=11 is larger than the layer 'down' allows"),
    (one(lambda: nn.Conv1d(4, 8, 1)), named("0", r=5), r"r=5 is larger than the layer '0' allows \(4"),
    (one(lambda: nn.Conv2d(4, 8, 3, groups=4)), named("0"), "'0': it has 4 groups and r=2 is no multiple"),
    (Mixture, bare("up", r=7), r"'experts.up' allows \(6"),
    (in_parts, named("0", r=3, slices={"0": {**HALVES, "sizes": [10, 2], "take": ["b"]}}), r"allows \(2"),
    (embedding, rows([11]), "'0' has rows 0 to 8, got 11"),
    (embedding, rows({"2": [1]}), "'2' is a Linear, not an nn.Embedding"),
    (Attention, named("attn", slices={"attn": ["w"]}), "'attn' has the parts q, k, v, got 'w'"),
    (in_parts, named("0", slices={"0": ["q", "v"]}), "the layout of '0' is not known; write it out"),
    (in_parts, named("0", slices={"0": {**HALVES, "sizes": [4, 4]}}), "add up to 8 rows, but its weight has 12"),
    (in_parts, named("0", slices={"0": {"of": list("abcde"), "take": ["a"]}}), "add up to 10 rows"),
    (one(lambda: nn.Conv1d(4, 4, 1)), named("0", slices={"0": HALVES}), "'0', a Conv1d, has no parts"),
    # an option that a kind cannot take
    (Attended, named("attention", use_dora=True), "use_dora: 'attention', a MultiheadAttention, has no"),
    (Attended, named("attention.out_proj", lora_bias=True), "'attention.out_proj', .*, takes no bias on B"),
    (Attended, named("conv", init="pissa"), "made for linear layers; 'conv' is a Conv1d"),
    (Attended, named("attention", init="olora"), "made for linear layers; 'attention' is a Multihead"),
    (Attended, bare("up.weight", use_dora=True), "'up.weight', a bare parameter"),
    (Attended, bare("up.weight", init="pissa"), "'up.weight' is a bare param"),
    *[
        (
            in_parts,
            named("0", slices={"0": HALVES}, **{option: value}),
            f"{option}.* no form for chosen slices yet.*'0'",
        )
        for option, value in (("use_dora", True), ("lora_bias", True), ("init", "pissa"))
    ],
    (lambda: embedding(max_norm=1.0), named("0", use_dora=True), "max_norm, which bounds each row, and DoRA rescales"),
    *[(odd, named("0", "1", **option), r"'1'.*Odd") for option in ({"use_dora": True}, {"lora_bias": True})],
    (odd, named("0", "1", init="pissa"), r"'1'.*Odd"),
    (Attention, named("attn", dropout=0.5), r"'attn'.*dropout_pattern"),
    (Attention, named("out_proj", dropout=0.5), r"'attn\.out_proj'.*dropout_pattern"),
    (Mixture, bare("up", dropout=0.1), "dropout cannot be honoured"),
    (one(lambda: nn.Linear(4, 4, bias=False)), named("0", bias="lora_only"), "bias to train"),
    (lambda: nn.Sequential(nn.Linear(4, 4, bias=False)), named("0", bias="all"), "bias to train"),
    (net, {"lora_bias": True}, r"lora_bias: 'down' has no bias for a merge.*exclude_modules=\[\"down\"\]"),
    (net, {"init": "orthogonal", "r": 3}, r"needs an even r, got r=3 \(module 'up'\)"),
]


@pytest.mark.parametrize(("make", "fields", "words"), REFUSED, ids=[words[:60] for _, _, words in REFUSED])
def test_a_refused_injection_says_why_in_one_line_and_leaves_the_model_as_it_was(make, fields, words, monkeypatch):
    monkeypatch.setitem(KINDS, Odd, LoRAOdd)
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
    "lora_copy.bias": ({"modules_to_save": ["up"]}, "the copy of 'up' is not finite"),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_finite_is_neither_merged_nor_saved(name, value, tmp_path):
    options, message = BROKEN[name]
    model = net()
    inject(model, LoRAConfig(r=2, **options))
    shake(model).get_parameter(f"up.{name}").data.view(-1)[0] = value
    kinds, weight = [type(m) for m in model.modules()], model.down.weight.clone()
    with pytest.raises(MergeError, match=message):
        merge(model)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model.down.weight, weight)
    with pytest.raises(AdapterError, match="is not finite"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_to_merge_or_save_is_refused_so_that_no_update_counts_twice(tmp_path):
    model = net()
    inject(model, LoRAConfig(r=2))
    merge(shake(model))
    with pytest.raises(MergeError, match="no adapters"):
        merge(model)
    with pytest.raises(AdapterError, match="nothing to save"):
        save_adapter(model, tmp_path)


class Gates(nn.Module):
    """Blocks with gates that are narrower than most ranks, one of them under the name of a wide layer."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "shared_expert_gate": nn.Linear(16, 1),
                    "gate": nn.Linear(16, 16),
                    "router": nn.ModuleDict({"gate": nn.Linear(16, 2)}),
                }
            )
            for _ in range(3)
        )


def signed():
    return nn.ModuleDict({"a+b (c)": nn.Linear(2, 2), "c": nn.Linear(8, 8), "head": nn.Linear(8, 2)})


def test_a_rank_that_layers_do_not_allow_is_answered_with_lines_that_help():
    with pytest.raises(TargetError) as caught:
        inject(Gates(), LoRAConfig(r=8, target_modules=["shared_expert_gate", "gate"]))
    said = str(caught.value)
    assert "r=8 is larger than the layer 'blocks.0.shared_expert_gate' allows (1, " in said
    assert "nor do 5 more" in said
    ranks = 'rank_pattern={"shared_expert_gate": 1, "router.gate": 2}'
    excluded = 'exclude_modules=["shared_expert_gate", "router.gate"]'
    for line, r in ((ranks, [1, 8, 2]), (excluded, [8])):
        assert line in said
        report = inject(Gates(), eval(f"LoRAConfig(r=8, target_modules=['shared_expert_gate', 'gate'], {line})"))
        assert [row.r for row in report.modules] == r * 3
    with pytest.raises(TargetError) as caught:
        inject(signed(), LoRAConfig(r=4, target_modules=["a+b (c)", "c"]))
    line = str(caught.value).partition("add ")[2].partition(", or")[0]
    report = inject(signed(), eval(f"LoRAConfig(r=4, target_modules=['a+b (c)', 'c'], {line})"))
    assert [row.r for row in report.modules] == [2, 4]


def test_all_linear_leaves_out_what_is_narrower_than_r_and_says_so():
    report = inject(Gates(), LoRAConfig(r=8))
    assert {row.module for row in report.modules} == {f"blocks.{i}.gate" for i in range(3)}
    left = {f"blocks.{i}.{name}" for i in range(3) for name in ("shared_expert_gate", "router.gate")}
    assert {name for name, reason in report.skipped.items() if "r=8 is larger" in reason} == left
    assert all(name in str(report) for name in ("shared_expert_gate", "left out"))
    with pytest.raises(TargetError, match=r"selects nothing .*left out: '0' \(r=8 is larger .*, 4\)"):
        inject(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), LoRAConfig(r=8))
