"""What cannot be done is refused before anything has changed, with what was expected, what came and what to do."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_lightning import LoRAConfig, LoRAError, inject, merge, save_adapter
from lora_lightning.lora.errors import AdapterError, ConfigError, MergeError, TargetError
from lora_lightning.lora.inject import adapted_layers, grafted_modules
from tests.lora.options_support import net, shake


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, got 0"),
        ({"r": 2.5}, "r must be a whole number of at least 1, got 2.5"),
        ({"r": True}, "r must be a whole number of at least 1, got True"),
        ({"alpha": -1}, "alpha must be a finite number above 0, got -1"),
        ({"alpha": float("nan")}, "alpha must be a finite number above 0, got nan"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"rank_pattern": {"up": 0}}, r"rank_pattern\['up'\] must be a whole number of at least 1, got 0"),
        ({"alpha_pattern": {"up": 0}}, r"alpha_pattern\['up'\] must be a finite number above 0, got 0"),
        ({"rank_pattern": {"(": 2}}, r"'\(' is not a regular expression"),
        ({"rank_pattern": {"(?i)q": 2}}, r"rank_pattern: '\(\?i\)q' is not a regular expression \(global flags"),
        ({"slices": {"(?i)q": ["q"]}}, r"slices: '\(\?i\)q' is not a regular expression \(global flags"),
        ({"target_modules": "("}, r"target_modules: '\(' is not a regular expression"),
        ({"target_modules": []}, "target_modules selects nothing"),
        ({"init": "gausian"}, "did you mean 'gaussian'"),
        ({"bias": True}, "bias must be one of none, all, lora_only, got True"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_a_value_that_means_nothing(options, message):
    with pytest.raises(ConfigError, match=message):
        LoRAConfig(**options)


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ConfigError, match="no field 'lora_dora'; did you mean"):
        LoRAConfig.from_dict({"lora_dora": True})


def test_a_config_survives_its_plain_form():
    config = LoRAConfig(use_dora=True, bias="all", init="pissa_niter_4", dropout_pattern={"up": 0.5})
    assert LoRAConfig.from_dict(config.to_dict()) == config


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x):
        return x @ self.out_proj.weight.T


class Bypass(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = OwnAttention(8, 2)
        self.norm = nn.LayerNorm(8)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (Bypass, {"target_modules": ["norm"]}, "selects 'norm', a LayerNorm, which has no LoRA form"),
        (net, {"target_modules": ["up"], "r": 13}, "r=13 is larger than the layer 'up' allows.*rank_pattern"),
        (net, {"layers_to_transform": 3}, "no selected module is in block 3"),
        (net, {"target_modules": ["up", "head"], "modules_to_save": ["head"]}, "'head' is in modules_to_save"),
        (net, {"exclude_modules": ["up", "down", "square"]}, "is empty"),
        (net, {"target_modules": r"up|.*\.downn"}, None),
        (net, {"target_modules": "upp"}, "no module matches 'upp'; did you mean 'up'"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_a_selection_that_fits_nothing_or_cannot_be_adapted(model, config, message):
    model = model()
    if message is None:  # a regular expression is one entry, and this one hits
        inject(model, LoRAConfig(r=2, **{k: v for k, v in config.items() if k != "r"}))
        assert [name for name, _ in adapted_layers(model)] == ["up"]
        return
    with pytest.raises(TargetError, match=message):
        inject(model, LoRAConfig(**{"r": 2, **config}))
    assert not grafted_modules(model)
    assert all(p.requires_grad for p in model.parameters())


def test_injecting_twice():
    model = net()
    inject(model, LoRAConfig(r=2, target_modules=["up"]))
    with pytest.raises(LoRAError, match="adapted already"):
        inject(model, LoRAConfig(r=2, target_modules=["down"]))
    with pytest.raises(LoRAError, match="adapted already"):
        inject(model.up, LoRAConfig(r=2, target_modules=["up"]))


def test_injecting_over_another_librarys_adapter():
    theirs = get_peft_model(net(), LoraConfig(r=2, target_modules=["up"]))
    with pytest.raises(LoRAError, match="LoRA layers of another library"):
        inject(theirs, LoRAConfig(r=2))


def test_what_is_no_module():
    with pytest.raises(LoRAError, match=r"expects an nn\.Module, got dict"):
        inject({}, LoRAConfig())


BROKEN = {
    "lora_A": ({}, "A or B of 'up' is not finite"),
    "lora_B": ({}, "A or B of 'up' is not finite"),
    "lora_magnitude_vector": ({"use_dora": True}, "lora_magnitude_vector of 'up' is not finite"),
    "lora_trained_bias": ({"bias": "all"}, "lora_trained_bias of 'up' is not finite"),
    "lora_B_bias": ({"lora_bias": True, "exclude_modules": ["down"]}, "lora_B_bias of 'up' is not finite"),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_finite_is_neither_merged_nor_saved(name, value, tmp_path):
    options, message = BROKEN[name]
    model = net()
    inject(model, LoRAConfig(r=2, **options))
    shake(model)
    tensor = model.up.lora_tensors()[name]
    tensor.data.view(-1)[0] = value
    kinds = [type(m) for m in model.modules()]
    weight = model.down.weight.clone()
    with pytest.raises(MergeError, match=message):
        merge(model)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model.down.weight, weight)
    with pytest.raises(AdapterError, match="is not finite"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_copy_that_is_not_finite_is_not_merged():
    model = net()
    inject(model, LoRAConfig(r=2, modules_to_save=["head"]))
    model.head.lora_copy.weight.data[0, 0] = float("inf")
    with pytest.raises(MergeError, match="the copy of 'head' is not finite"):
        merge(model)


def test_nothing_to_merge_or_save(tmp_path):
    with pytest.raises(MergeError, match="nothing to merge"):
        merge(net())
    with pytest.raises(AdapterError, match="nothing to save"):
        save_adapter(net(), tmp_path)


class Experts(nn.Module):
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


def test_a_rank_that_several_layers_do_not_allow_names_lines_that_help():
    with pytest.raises(TargetError) as caught:
        inject(Experts(), LoRAConfig(r=8, target_modules=["shared_expert_gate", "gate"]))
    said = str(caught.value)
    assert "r=8 is larger than the layer 'blocks.0.shared_expert_gate' allows (1, " in said
    assert "nor do 5 more" in said
    ranks = 'rank_pattern={"shared_expert_gate": 1, "router.gate": 2}'
    excluded = 'exclude_modules=["shared_expert_gate", "router.gate"]'
    for line, r in ((ranks, [1, 8, 2]), (excluded, [8])):
        assert line in said
        report = inject(Experts(), eval(f"LoRAConfig(r=8, target_modules=['shared_expert_gate', 'gate'], {line})"))
        assert [row.r for row in report.modules] == r * 3


def test_all_linear_leaves_out_what_is_narrower_than_r_and_says_so():
    report = inject(Experts(), LoRAConfig(r=8))
    assert {row.module for row in report.modules} == {f"blocks.{i}.gate" for i in range(3)}
    left = {f"blocks.{i}.{name}" for i in range(3) for name in ("shared_expert_gate", "router.gate")}
    assert {name for name, reason in report.skipped.items() if "r=8 is larger" in reason} == left


def test_all_linear_that_leaves_nothing_says_why():
    with pytest.raises(TargetError, match=r"selects nothing .*left out: '0' \(r=8 is larger .*, 4\)"):
        inject(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), LoRAConfig(r=8))


def test_all_linear_takes_the_tiny_qwen2_moe_and_a_named_gate_stays_refused():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "shared_expert_intermediate_size": 40}
    config = Qwen2MoeConfig(**sizes, vocab_size=50, num_experts=4, num_experts_per_tok=2)
    report = inject(Qwen2MoeForCausalLM(config), LoRAConfig(r=8))
    gates = [f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2)]
    assert all("r=8 is larger than the smaller side of its weight, 1" in report.skipped[gate] for gate in gates)
    assert {row.module.rpartition(".")[2] for row in report.modules} >= {"q_proj", "o_proj", "up_proj"}
    assert all(name in str(report) for name in ("shared_expert_gate", "left out"))
    for named in ({"target_modules": ["q_proj", "shared_expert_gate"]}, {"rank_pattern": {"shared_expert_gate": 8}}):
        with pytest.raises(TargetError, match=r"shared_expert_gate' allows \(1"):
            inject(Qwen2MoeForCausalLM(config), LoRAConfig(r=8, **named))


def test_a_rank_for_a_name_with_signs_names_a_pattern_that_selects_it():
    def make():
        return nn.ModuleDict({"a+b (c)": nn.Linear(2, 2), "c": nn.Linear(8, 8), "head": nn.Linear(8, 2)})

    with pytest.raises(TargetError) as caught:
        inject(make(), LoRAConfig(r=4, target_modules=["a+b (c)", "c"]))
    line = str(caught.value).partition("add ")[2].partition(", or")[0]
    assert [
        row.r for row in inject(make(), eval(f"LoRAConfig(r=4, target_modules=['a+b (c)', 'c'], {line})")).modules
    ] == [2, 4]
