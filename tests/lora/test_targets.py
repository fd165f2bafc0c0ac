import collections
import copy
import itertools
import warnings

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from lora_lightning import LoRAConfig, inject
from lora_lightning.lora.errors import AdapterWarning, TargetError
from lora_lightning.lora.report import STACK
from lora_lightning.lora.targets.select import select
from tests.factories import FAMILIES, Own, bert, hf


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


SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}


def test_all_linear_warns_of_experts_that_are_bare_stacks_until_target_parameters_names_them():
    stacks = [f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")]
    model = hf("MixtralForCausalLM", **SIZES, **HEADS)
    with pytest.warns(AdapterWarning, match=r"57% of .*target_parameters: \[experts.gate_up_proj, experts.down_proj\]"):
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


def test_each_module_carries_the_entry_that_selected_it():
    found = select(bert(), LoRAConfig(r=1, target_modules=["value", "attention.output.dense"])).targets
    assert {t.why for t in found} == {"value", "attention.output.dense"}
    assert all(t.name.endswith(f".{t.why}") for t in found)


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
    model = Own()
    assert names(model, target_modules=["head"]) == ["head"]
    assert names(model, target_modules=["inner.a", "lm_head"]) == ["inner.a", "lm_head"]
    assert names(model, target_modules=["inner.a+b (c)"]) == ["inner.a+b (c)"]
    assert names(model, target_modules=["a+b (c)"]) == ["inner.a+b (c)"]
    assert settings_of(model, r=1, target_modules=["inner.a+b (c)", "inner.a"], rank_pattern={"inner.a+b (c)": 3}) == {
        "inner.a+b (c)": (3, 2.0),
        "inner.a": (1, 2.0),
    }


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


def saved(model, *entries):
    return [name for name, _ in select(model, LoRAConfig(target_modules=["first"], modules_to_save=[*entries])).saved]


def test_saved_modules_are_exact_names_or_one_unique_end():
    model = Own()
    assert saved(model, "head") == ["head"]
    assert saved(model, "a+b (c)") == ["inner.a+b (c)"]
    model.twin = nn.Sequential(collections.OrderedDict(head=nn.Linear(2, 2)))
    assert saved(model, "head") == ["head"]  # the full name of one, the end of another
    assert saved(model, "twin.head", "twin") == ["twin"]
    model.third = copy.deepcopy(model.twin)
    del model.head
    with pytest.raises(TargetError, match=r"'head' is the end of several names: write in full '.*head', '.*head'"):
        saved(model, "head")
