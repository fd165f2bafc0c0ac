"""Presets of target modules, and the patterns of rank, alpha and dropout."""

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFTS
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel

from lora_lightning import LoRAConfig, inject
from lora_lightning.lora.errors import TargetError
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.lora.targets.patterns import matches
from lora_lightning.lora.targets.presets import LAYOUTS, PRESETS, preset_pattern
from tests.lora.kinds import inputs, net
from tests.lora.laws import stir

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
    """What a preset names is there, attention and mlp do not overlap, and query-value is part of attention."""
    model, layout = on_meta(model_type), LAYOUTS[model_type]
    matrices = [n for n, m in model.named_modules() if (w := m._parameters.get("weight")) is not None and w.dim() == 2]
    chosen = {}
    for preset, pattern in zip(
        PRESETS, (layout.query_value or layout.query_value_of, layout.attention, layout.mlp), strict=True
    ):
        if pattern is None:
            with pytest.raises(TargetError, match=f"preset '{preset}'"):
                preset_pattern(model, preset)
            chosen[preset] = set()
            continue
        chosen[preset] = {n for n in matrices if matches(preset_pattern(model, preset), n)}
        assert len(chosen[preset]) >= 2, preset
    assert not chosen["attention"] & chosen["mlp"]
    assert chosen["query-value"] <= chosen["attention"]
    if chosen["query-value"]:
        assert 0 < len(chosen["query-value"]) <= len(chosen["attention"]) / 2


@pytest.mark.parametrize("model_type", sorted(t for t in LAYOUTS if LAYOUTS[t].query_value and t in PEFTS))
def test_query_value_is_pefts_choice(model_type):
    model = on_meta(model_type)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    ours = {n for n in names if matches(preset_pattern(model, "query-value"), n)}
    theirs = {n for n in names if matches(PEFTS[model_type], n)}
    if model_type == "phi":  # there PEFT adds the mlp
        theirs = {n for n in theirs if "mlp" not in n}
    assert ours == theirs


def test_a_preset_adapts_what_it_names_and_says_so():
    model = on_meta("llama")
    report = inject(model, LoRAConfig(target_modules="query-value"))
    assert [row.module.rpartition(".")[2] for row in report.modules] == ["q_proj", "v_proj"] * 2
    assert {row.why for row in report.modules} == {"query-value"}


@pytest.mark.parametrize("model_type", sorted(t for t in LAYOUTS if LAYOUTS[t].query_value_of))
def test_query_value_of_a_fused_layer_is_two_of_its_parts(model_type):
    model = on_meta(model_type)
    report = inject(model, LoRAConfig(r=2, target_modules="query-value"))
    assert [row.kind[-6:] for row in report.modules] == ["[q, v]"] * 2
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
    model = net()
    inject(model, LoRAConfig(r=2, dropout=0.5, dropout_pattern={"up|down|square": 0.0}))
    stir(model).train()
    assert torch.equal(model(inputs()), model(inputs())), "layers without dropout are not random in training"
