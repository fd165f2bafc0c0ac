import dataclasses
import json
import math

import pytest

from lora_lightning import LoRAConfig, LoRAError
from lora_lightning.lora.errors import ConfigError
from tests.lora.kinds import CASES, fields_of

WHOLE, POSITIVE, RATE = (
    "a whole number of at least 1, got",
    "a finite number above 0, got",
    "at least 0 and below 1, got",
)
NOT_A_PATTERN = r"'\(' is not a regular expression"
FLAGS = r"'\(\?i\)q' is not a regular expression \(global flags"
BAD = [
    ("r", (0, -1, 1.0, True, "8", None, 2.5), f"^r must be {WHOLE}"),
    ("alpha", (0, -1.0, math.nan, math.inf, "16", True), f"alpha must be {POSITIVE}"),
    ("dropout", (1.0, -0.1, math.nan, "0.1", None, True), f"dropout must be {RATE}"),
    ("init", ("zeros", None, [], "", "pissa_niter_"), "init must be one of gaussian, .* or pissa_niter_<n>"),
    ("init", ("gausian",), "did you mean 'gaussian'"),
    ("bias", ("some",), "bias must be one of none, all, lora_only, got 'some'"),
    ("use_rslora", ("false", 1, None), "use_rslora"),
    ("target_modules", ("", None, 5, [""], [1], {1, "a"}, "query(", {"a": 1}, b"query"), "target_modules"),
    ("target_modules", ([],), "target_modules selects nothing"),
    ("exclude_modules", ("(", 5, [None]), "exclude_modules"),
    ("modules_to_save", ("head", [""], 3), "modules_to_save"),
    ("layers_to_transform", (-1, 5.5, [], [True], True, ["1"], "01", [0, -2]), "layers_to_transform"),
    ("trainable_token_indices", ([-1],), "from 0 on, got"),
    ("trainable_token_indices", ([1, 1],), "trainable_token_indices .*twice"),
    ("rank_pattern", ({"q": 0}, {"q": 2.0}, {"q": True}), rf"rank_pattern\['q'\] must be {WHOLE}"),
    ("rank_pattern", ({0: 4}, [1], {"": 2}, "q"), "rank_pattern"),
    ("rank_pattern", ({"(": 2},), NOT_A_PATTERN),
    ("rank_pattern", ({"(?i)q": 2},), f"rank_pattern: {FLAGS}"),
    ("alpha_pattern", ({"q": 0}, {"q": math.nan}, {"q": None}), rf"alpha_pattern\['q'\] must be {POSITIVE}"),
    ("alpha_pattern", ({"(": 2}, {0: 4.0}), "alpha_pattern"),
    ("dropout_pattern", [{"up": p} for p in (1.0, -0.1, True, "much")], r"dropout_pattern\['up'\] must be at least 0"),
    ("slices", ({"(?i)q": ["q"]},), f"slices: {FLAGS}"),
    ("slices", ({"0": []}, {"0": "q"}), "must list the parts"),
    ("slices", ({"0": {"take": ["q"]}},), "must hold 'of', 'take'"),
    ("slices", ({"0": {"of": ["q"], "take": ["q"]}},), "at least two different parts"),
    ("slices", ({"0": {"of": ["query", "value"], "take": ["qurey"]}},), "did you mean 'query'"),
    ("slices", ({"0": {"of": ["q", "k"], "take": ["q"], "heads": 0}},), "whole numbers of at least 1, got 0"),
    ("slices", ({"0": {"of": ["q", "k"], "take": ["q"], "sizes": [1]}},), "one number for each part"),
]


@pytest.mark.parametrize(("name", "values", "words"), BAD, ids=[f"{name}: {words}" for name, _, words in BAD])
def test_a_value_that_means_nothing_is_refused_by_its_name(name, values, words):
    for value in values:
        with pytest.raises(ConfigError, match=words) as caught:
            LoRAConfig(**{name: value})
        assert isinstance(caught.value, LoRAError)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_dora_and_a_bias_of_b_exclude_each_other():
    with pytest.raises(ConfigError, match="exclude each other"):
        LoRAConfig(use_dora=True, lora_bias=True)


def test_defaults_follow_the_evidence():
    config = LoRAConfig()
    assert (config.r, config.alpha, config.dropout, config.init) == (8, 16.0, 0.0, "gaussian")
    assert config.target_modules == "all-linear"
    assert LoRAConfig(r=3).alpha == 6


def test_a_config_survives_as_plain_data():
    blocks = [{"target_modules": r".*\.(q|v)", "layers_to_transform": n} for n in (0, [1, 2])]
    for fields in [*(fields_of(*case) for case in CASES), *blocks]:
        config = LoRAConfig(**fields)
        assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True))) == config


def test_a_config_is_frozen_and_keyword_only_and_keeps_no_reference_to_its_caller():
    names, ranks = ["q"], {"q": 2}
    config = LoRAConfig(target_modules=names, rank_pattern=ranks)
    names.append("v")
    ranks["q"] = 4
    assert (config.target_modules, config.rank_pattern) == (["q"], {"q": 2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 4
    with pytest.raises(TypeError):
        LoRAConfig(8)


def test_yaml_nulls_and_sets_are_read_as_meant():
    assert LoRAConfig(rank_pattern=None, alpha_pattern=None) == LoRAConfig()
    for names in ({"v", "q"}, ("q", "q", "v")):
        assert LoRAConfig(target_modules=names).target_modules == ["q", "v"]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("targets_modules", "target_modules"), ("aplha", "alpha"), ("R", "r"), ("lora_dora", "use_dora")],
)
def test_an_unknown_field_names_the_nearest(wrong, right):
    with pytest.raises(ConfigError, match=f"no field '{wrong}'.*'{right}'"):
        LoRAConfig.from_dict({wrong: 1})
