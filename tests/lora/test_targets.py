"""What a config selects and why: patterns, presets, parts of fused projections, and layers that are passed by."""

import collections
import copy
import itertools
import warnings

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFTS
from timm.models.vision_transformer import Attention as VisionAttention
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel
from transformers.models.bloom.modeling_bloom import BloomAttention

from lora_lightning import LoRAConfig, inject
from lora_lightning.lora.errors import AdapterWarning, TargetError
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.lora.report import STACK
from lora_lightning.lora.targets.output_heads import output_head
from lora_lightning.lora.targets.patterns import matches
from lora_lightning.lora.targets.presets import LAYOUTS, PRESETS, preset_pattern
from lora_lightning.lora.targets.select import select
from tests.factories import FAMILIES, Own, bert, hf
from tests.lora.kinds import ONE_BLOCK, SPECS, alone, net
from tests.lora.laws import config, stir
from tests.lora.test_families import FAMILIES as FAMILIES_OF_THE_HUB


def names(model, **fields):
    return [target.name for target in select(model, LoRAConfig(**{"r": 1, **fields})).targets]


def settings_of(model, **fields):
    return {t.name: (t.settings.r, t.settings.alpha) for t in select(model, LoRAConfig(**fields)).targets}


PATTERNS = [
    {"target_modules": ["query", "value"]},
    {"target_modules": r".*\.(query|key)"},
    {"target_modules": ["attention.output.dense"]},
    {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]},
    {"target_modules": ["dense"], "exclude_modules": r".*pooler.*"},
    {"target_modules": ["query"], "layers_to_transform": 1},
    {"target_modules": ["query", "dense"], "layers_to_transform": [0]},
    {"target_modules": ["query", "bert.encoder.layer.1.output.dense"], "layers_to_transform": [1]},
]


@pytest.mark.parametrize("fields", PATTERNS, ids=str)
def test_a_pattern_selects_what_peft_selects(fields):
    model = bert()
    config = peft.LoraConfig(**fields)
    theirs = [n for n, m in model.named_modules() if check_target_module_exists(config, n) and isinstance(m, nn.Linear)]
    assert names(model, **fields) == theirs
    assert theirs


@pytest.mark.parametrize("name", ["bert", "llama", "gpt"])
def test_all_linear_selects_what_peft_selects(name):
    model, twin = FAMILIES[name].build(), FAMILIES[name].build()
    task = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    theirs = peft.get_peft_model(twin, peft.LoraConfig(r=1, target_modules="all-linear", task_type=task))
    wanted = [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert names(model, target_modules="all-linear") == [n.removeprefix("base_model.model.") for n in wanted]
    assert len(wanted) >= 8


def test_all_linear_warns_of_experts_that_are_bare_stacks_until_target_parameters_names_them():
    stacks = [f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")]
    model = FAMILIES_OF_THE_HUB["mixtral"][0]()
    with pytest.warns(AdapterWarning, match=r"61% of .*target_parameters: \[experts.gate_up_proj, experts.down_proj\]"):
        report = inject(copy.deepcopy(model), LoRAConfig(r=2))
    assert [name for name, reason in report.skipped.items() if reason == STACK] == stacks
    assert "left out model.layers.*.mlp.experts.gate_up_proj (2)" in str(report)
    for settled in (
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        {"exclude_modules": ["experts"]},
        {"target_modules": "attention"},
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error", AdapterWarning)
            assert STACK not in inject(copy.deepcopy(model), LoRAConfig(r=2, **settled)).skipped.values()
    only = select(model, LoRAConfig(r=2, layers_to_transform=[1])).skipped
    assert [name for name, reason in only.items() if reason == STACK] == stacks[2:]


def test_all_linear_says_what_it_left_out():
    assert select(bert(), LoRAConfig(r=1)).skipped == {"classifier": "the output head"}
    assert not select(FAMILIES["encoder"].build(), LoRAConfig(r=1)).skipped
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8), "q": nn.Linear(8, 2)})
    selection = select(model, LoRAConfig(r=1))
    assert [t.name for t in selection.targets] == ["attn", "attn.out_proj", "up"]
    assert selection.skipped.keys() == {"q"}


DISTILLED = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}


def test_the_output_head_is_what_makes_the_output():
    of_families = {"sequential": ("4",), "encoder": (), "own": ("lm_head",), "bert": ("classifier",)}
    for name, head in {**of_families, "llama": ("lm_head",), "gpt": ("lm_head",)}.items():
        assert output_head(FAMILIES[name].make()) == head
    of_transformers = {"Llama": ("score", "SequenceClassification"), "Bert": ("qa_outputs", "QuestionAnswering")}
    with torch.device("meta"):
        for name, (head, task) in {**of_transformers, "ViT": ("classifier", "ImageClassification")}.items():
            assert output_head(hf(f"{name}For{task}", **ONE_BLOCK)) == (head,)
        assert output_head(hf("DistilBertForSequenceClassification", **DISTILLED)) == ("classifier",)
    model = Own()
    for name, next_one in [("lm_head", "overhead"), ("overhead", "head")]:  # by its whole name
        delattr(model, name)
        assert output_head(model) == (next_one,)


def test_the_head_of_a_plain_model_is_its_last_linear_layer_and_no_layer_of_a_repeated_block():
    def blocks(**last):
        block = nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)})
        return nn.ModuleDict({"layers": nn.ModuleList([block, copy.deepcopy(block)]), **last})

    for name in ("fc", "head", "readout"):
        assert output_head(blocks(**{name: nn.Linear(4, 2)})) == (name,)
    several = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert output_head(blocks(classifier=several)) == ("classifier",)
    bodies = [blocks(), bert().bert, FAMILIES["llama"].build().model]
    for model in [*bodies, nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)), nn.LayerNorm(3)]:
        assert output_head(model) == ()


@pytest.mark.parametrize(
    ("entry", "hint"),
    [("qurey", "query"), ("Query", "query"), ("querry", "query"), ("val", "value"), ("attention.self.quary", "query")],
)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save"])
def test_a_pattern_that_matches_nothing_names_near_misses(field, entry, hint):
    fields = {"target_modules": ["dense"], field: ["dense", entry] if field == "target_modules" else [entry]}
    with pytest.raises(TargetError, match=f"{field}: no module matches '{entry}'; did you mean .*{hint}") as caught:
        inject(bert(), LoRAConfig(**fields))
    assert "\n" not in str(caught.value)


def test_names_are_whole_words_and_their_signs_no_patterns():
    found = select(bert(), LoRAConfig(r=1, target_modules=["value", "attention.output.dense"])).targets
    assert {(t.why, t.name.endswith(f".{t.why}")) for t in found} == {("value", True), ("attention.output.dense", True)}
    model = Own()
    assert names(model, target_modules=["head"]) == ["head"]
    assert names(model, target_modules=["inner.a", "lm_head"]) == ["inner.a", "lm_head"]
    assert names(model, target_modules=["inner.a+b (c)"]) == ["inner.a+b (c)"]
    assert names(model, target_modules=["a+b (c)"]) == ["inner.a+b (c)"]


@given(st.permutations([("query", 2), ("1.attention.self.query", 3), (r".*\.0\..*(query|value)", 5), ("value", 1)]))
def test_the_winning_pattern_does_not_depend_on_their_order(pairs):
    ranks = settings_of(bert(), r=4, alpha=7, target_modules=["query", "value", "key"], rank_pattern=dict(pairs))
    alphas = settings_of(bert(), r=4, alpha=7, target_modules=["query", "value", "key"], alpha_pattern=dict(pairs))
    for layer, part, wanted in [(0, "query", 5), (0, "value", 5), (1, "query", 3), (1, "value", 1), (1, "key", None)]:
        name = f"bert.encoder.layer.{layer}.attention.self.{part}"
        assert ranks[name] == (wanted or 4, 7)
        assert alphas[name] == (4, wanted or 7)


def test_two_patterns_of_equal_weight_that_disagree_are_refused():
    for pairs in itertools.permutations([("quer.", 2), ("que.y", 3)]):
        with pytest.raises(TargetError, match=r"both match .* with different values"):
            names(bert(), target_modules=["query"], rank_pattern=dict(pairs))
    assert names(bert(), target_modules=["query"], rank_pattern={"quer.": 2, "que.y": 2})


def test_a_block_is_the_first_number_in_a_name():
    block = nn.ModuleDict({"experts": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(2, 2)})])})
    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([block, copy.deepcopy(block)])})})
    fields = {"target_modules": ["up"], "layers_to_transform": 1}
    theirs = [n for n, _ in model.named_modules() if check_target_module_exists(peft.LoraConfig(**fields), n)]
    assert names(model, **fields) == theirs == ["model.layers.1.experts.0.up"]
    chosen = LoRAConfig(r=1, target_modules=[], target_parameters=["weight"], layers_to_transform=[1])
    assert [row.module for row in inject(model, chosen).modules] == ["model.layers.1.experts.0.up.weight"]


def test_a_module_in_two_places_is_found_by_either_name():
    for name in ("second", "again"):
        assert names(Own(), target_modules=[name]) == ["second"]
        assert names(Own(), target_modules=["first", "second"], exclude_modules=[name]) == ["first"]


def test_saved_modules_are_not_adapted_too():
    for chosen in ("all-linear", ["dense"]):
        assert "bert.pooler.dense" not in names(bert(), target_modules=chosen, modules_to_save=["pooler"])


def test_saved_modules_are_exact_names_or_one_unique_end():
    def saved(*entries):
        config = LoRAConfig(target_modules=["first"], modules_to_save=[*entries])
        return [name for name, _ in select(model, config).saved]

    model = Own()
    assert saved("head") == ["head"]
    assert saved("a+b (c)") == ["inner.a+b (c)"]
    model.twin = nn.Sequential(collections.OrderedDict(head=nn.Linear(2, 2)))
    assert saved("head") == ["head"]  # the full name of one, the end of another
    assert saved("twin.head", "twin") == ["twin"]
    model.third = copy.deepcopy(model.twin)
    del model.head
    with pytest.raises(TargetError, match=r"'head' is the end of several names: write in full '.*head', '.*head'"):
        saved("head")


# Presets, by a model's type.


DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")


def on_meta(model_type):
    config = CONFIG_MAPPING[model_type]()
    for depth in DEPTHS:
        if depth in config.to_dict():
            setattr(config, depth, 2)
    if model_type == "clip":
        config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 2
    with torch.device("meta"):
        return AutoModel.from_config(config)


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_presets_part_the_blocks_weights_among_them(model_type):
    """What a preset names is there, attention and mlp do not overlap, and query-value is a part of attention."""
    model, layout = on_meta(model_type), LAYOUTS[model_type]
    matrices = [n for n, m in model.named_modules() if (w := m._parameters.get("weight")) is not None and w.dim() == 2]
    patterns, chosen = (layout.query_value, layout.attention, layout.mlp), {}
    for preset, pattern in zip(PRESETS, patterns, strict=True):
        if pattern is None:
            with pytest.raises(TargetError, match=f"preset '{preset}'"):
                preset_pattern(model, preset)
        else:
            chosen[preset] = {n for n in matrices if matches(preset_pattern(model, preset), n)}
            assert len(chosen[preset]) >= 2, preset
    attention = chosen.get("attention", set())
    assert not attention & chosen.get("mlp", set())
    if "query-value" in chosen:
        assert chosen["query-value"] <= attention
        assert len(chosen["query-value"]) <= len(attention) / 2
    if layout.query_value and model_type in PEFTS:
        theirs = {n for n in matrices if matches(PEFTS[model_type], n) and "mlp" not in n}  # which PEFT adds for phi
        assert chosen["query-value"] == theirs


@pytest.mark.parametrize("model_type", sorted(t for t in LAYOUTS if LAYOUTS[t].fused))
def test_query_value_of_a_fused_layer_is_two_of_its_parts(model_type):
    model = on_meta(model_type)
    report = inject(model, LoRAConfig(r=2, target_modules="query-value"))
    assert [(row.kind[-6:], row.why) for row in report.modules] == [("[q, v]", "query-value")] * 2
    assert all(layer.lora_settings.slices.names == ("q", "k", "v") for _, layer in adapted_layers(model))
    fused = {report.modules[0].module.rpartition(".")[2]: ["k"]}
    report = inject(on_meta(model_type), LoRAConfig(r=2, target_modules="query-value", slices=fused))
    assert report.modules[0].kind.endswith("[k]")


def test_a_preset_for_a_model_that_it_does_not_know_is_refused_with_near_ones(monkeypatch):
    with pytest.raises(TargetError, match=r"preset 'attention' goes by .*model_type, and Net has none"):
        inject(net(), LoRAConfig(target_modules="attention"))
    model = on_meta("qwen2")
    monkeypatch.delitem(LAYOUTS, "qwen2")
    with pytest.raises(TargetError, match=r"no preset 'mlp' for model_type 'qwen2'; did you mean 'qwen"):
        inject(model, LoRAConfig(target_modules="mlp"))


def test_dropout_pattern_sets_each_layers_dropout():
    model = net()
    report = inject(model, LoRAConfig(r=2, dropout=0.1, dropout_pattern={"up": 0.0, "s.*": 0.5}))
    rates = {name: layer.lora_dropout.p if layer.lora_dropout else 0.0 for name, layer in adapted_layers(model)}
    assert rates == {row.module: row.dropout for row in report.modules} == {"up": 0.0, "down": 0.1, "square": 0.5}


# Parts of fused projections.


def test_every_part_is_started_as_a_matrix_of_its_own():
    model = alone(nn.Linear, 512, 12)
    inject(model, config(r=4, target_modules=["0"], slices={"0": SPECS["thirds"]}))
    for part in model[0].lora_A.detach().split(4):
        assert abs(float(part.std()) * 512**0.5 - 1) < 0.1, "N(0, 1/in) in each part"


# The layouts that are known: where only some parts are trained, only those of the model's own tensors differ.


PHI3 = {**ONE_BLOCK, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0}
PROJECTIONS = {
    "gpt-neox": ("query_key_value", lambda: hf("GPTNeoXModel", **ONE_BLOCK, vocab_size=32)),
    "bloom": ("query_key_value", lambda: hf("BloomModel", vocab_size=32, hidden_size=16, n_layer=1, n_head=2)),
    "gpt2": ("c_attn", lambda: hf("GPT2Model", vocab_size=32, n_embd=16, n_layer=1, n_head=2)),
    "phi3": ("qkv_proj", lambda: hf("Phi3Model", **PHI3)),
    "timm": ("qkv", lambda: nn.ModuleDict({"attn": VisionAttention(16, num_heads=2)})),
}


@pytest.mark.parametrize("family", PROJECTIONS)
def test_the_known_layout_is_the_models_own(family, monkeypatch):
    """Seen in the query, key and value that reach the product, and in the output of a layer of gate and up."""
    name, make = PROJECTIONS[family]
    plain, seen, product, split = make().eval(), [], nn.functional.scaled_dot_product_attention, BloomAttention._reshape
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, *args, **kwargs: seen.append((q, k, v)) or product(q, k, v, *args, **kwargs),
    )
    monkeypatch.setattr(BloomAttention, "_reshape", lambda self, x: seen.append(split(self, x)) or seen[-1])
    with torch.no_grad():
        run = lambda m: m["attn"](torch.ones(1, 3, 16)) if family == "timm" else m(torch.arange(5)[None])  # noqa: E731
        run(plain)
        for part in "qkv":
            adapted = copy.deepcopy(plain)
            inject(adapted, config(target_modules=[name], slices={name: [part]}))
            run(stir(adapted))
            changed = [not torch.equal(a, b) for a, b in zip(seen[0], seen[-1], strict=True)]
            assert changed == [p == part for p in "qkv"]
    if family == "phi3":
        fused, x = plain.layers[0].mlp.gate_up_proj, torch.randn(1, 3, 16)
        before = fused(x).chunk(2, dim=-1)
        inject(plain, config(target_modules=["gate_up_proj"], slices={"gate_up_proj": ["up"]}))
        stir(plain)
        assert [torch.equal(*pair) for pair in zip(fused(x).chunk(2, dim=-1), before, strict=True)] == [True, False]


# Places where a module's weight is read and the module not called: handled, or refused by name (law 4).


def readers():
    """Attentions of the table with an input that goes through them, and the children whose weight they read."""
    from timm.models.beit import Attention
    from timm.models.eva import EvaAttention
    from timm.models.swin_transformer_v2 import WindowAttention
    from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

    pixels, tokens = torch.randn(2, 4, 4, 8), torch.randn(2, 4, 8)
    return [
        (ShiftedWindowAttention(8, [2, 2], [0, 0], 2), pixels, ["qkv", "proj"]),
        (ShiftedWindowAttentionV2(8, [2, 2], [0, 0], 2), pixels, ["qkv", "proj"]),
        (Attention(8, 2, qkv_bias=True), tokens, ["qkv"]),
        (EvaAttention(8, 2, qkv_bias=True, norm_layer=nn.LayerNorm), tokens, ["qkv"]),
        (WindowAttention(8, (2, 2), 2), tokens, ["qkv"]),
        (WavLMAttention(8, 2), tokens, ["q_proj", "k_proj", "v_proj", "out_proj"]),
    ]


@pytest.mark.parametrize("which", range(6))
def test_a_layer_whose_parent_reads_its_weight_is_refused_by_name_and_left_out_of_all_linear(which):
    """And the parent really does: it never calls the child. Where a later release does, its row can go."""
    module, x, children = readers()[which]
    called = []
    for child in children:
        module.get_submodule(child).register_forward_hook(lambda *_, child=child: called.append(child))
    module(x)
    assert not called
    model = nn.ModuleDict({"attn": module, "up": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
    for child in children:
        refusal = rf"cannot adapt 'attn\.{child}': {type(module).__name__} reads its weight"
        with pytest.raises(TargetError, match=refusal):
            inject(model, config(target_modules=[child]))
    report = inject(model, config(target_modules="all-linear"))
    assert {f"attn.{child}" for child in children} <= report.skipped.keys()
    assert "up" in {row.module for row in report.modules}


def test_mambas_projections_which_its_kernels_read_are_left_out_of_all_linear():
    sizes = {"hidden_size": 8, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 4, "vocab_size": 20}
    report = inject(hf("MambaForCausalLM", **sizes), config(target_modules="all-linear"))
    assert [row.module for row in report.modules] == ["backbone.layers.0.mixer.in_proj"]
    left = {f"backbone.layers.0.mixer.{child}" for child in ("x_proj", "dt_proj", "out_proj")}
    assert left <= report.skipped.keys()
