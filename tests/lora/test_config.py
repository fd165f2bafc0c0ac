from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lightning import LoRAConfig, LoRAError
from lora_lightning.lora.errors import ConfigError, near_misses

BAD = [
    *[{"r": r} for r in (0, -1, 1.0, True, "8", None)],
    *[{"alpha": a} for a in (0, -1.0, math.nan, math.inf, "16", True)],
    *[{"dropout": d} for d in (1.0, -0.1, math.nan, "0.1", None, True)],
    *[{"init": i} for i in ("zeros", None, [])],
    *[{"use_rslora": u} for u in ("false", 1, None)],
    *[{"target_modules": t} for t in ("", [], None, 5, [""], [1], {1, "a"}, "query(", {"a": 1}, b"query")],
    *[{"exclude_modules": e} for e in ("(", 5, [None])],
    *[{"modules_to_save": m} for m in ("head", [""], 3)],
    *[{"layers_to_transform": n} for n in (-1, 5.5, [], [True], True, ["1"], "01", [0, -2])],
    *[{"rank_pattern": p} for p in ({"q": 0}, {"q": 2.0}, {"q": True}, {"(": 2}, {0: 4}, [1], {"": 2}, "q")],
    *[{"alpha_pattern": p} for p in ({"q": 0}, {"q": math.nan}, {"(": 2}, {0: 4.0}, {"q": None})],
]


@pytest.mark.parametrize("fields", BAD, ids="-".join)  # a set has another str in each process
def test_a_value_that_means_nothing_is_refused_by_its_name(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))) as caught:
        LoRAConfig(**fields)
    assert isinstance(caught.value, LoRAError)
    assert "\n" not in str(caught.value)


WORDS = [
    ({"r": 2.5}, "r must be a whole number of at least 1, got 2.5"),
    ({"alpha": -1}, "alpha must be a finite number above 0, got -1"),
    ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    *[
        ({"dropout_pattern": {"up": p}}, r"dropout_pattern\['up'\] must be at least 0")
        for p in (1.0, -0.1, True, "much")
    ],
    ({"rank_pattern": {"up": 0}}, r"rank_pattern\['up'\] must be a whole number of at least 1, got 0"),
    ({"alpha_pattern": {"up": 0}}, r"alpha_pattern\['up'\] must be a finite number above 0, got 0"),
    ({"rank_pattern": {"(": 2}}, r"'\(' is not a regular expression"),
    ({"rank_pattern": {"(?i)q": 2}}, r"rank_pattern: '\(\?i\)q' is not a regular expression \(global flags"),
    ({"slices": {"(?i)q": ["q"]}}, r"slices: '\(\?i\)q' is not a regular expression \(global flags"),
    ({"target_modules": []}, "target_modules selects nothing"),
    ({"init": "gausian"}, "did you mean 'gaussian'"),
    *[
        ({"init": init}, r"init must be one of gaussian, .* or pissa_niter_<n>")
        for init in ("pissa_niter_", "", "zeros")
    ],
    ({"bias": "some"}, "bias must be one of none, all, lora_only, got 'some'"),
    ({"use_dora": True, "lora_bias": True}, "exclude each other"),
    ({"trainable_token_indices": [-1]}, "from 0 on, got"),
    ({"trainable_token_indices": [1, 1]}, "a token twice"),
    *[({"slices": {"0": spec}}, "must list the parts") for spec in ([], "q")],
    ({"slices": {"0": {"take": ["q"]}}}, "must hold 'of', 'take'"),
    ({"slices": {"0": {"of": ["q"], "take": ["q"]}}}, "at least two different parts"),
    ({"slices": {"0": {"of": ["query", "value"], "take": ["qurey"]}}}, "did you mean 'query'"),
    ({"slices": {"0": {"of": ["q", "k"], "take": ["q"], "heads": 0}}}, "whole numbers of at least 1, got 0"),
    ({"slices": {"0": {"of": ["q", "k"], "take": ["q"], "sizes": [1]}}}, "one number for each part"),
]


@pytest.mark.parametrize(("fields", "words"), WORDS, ids=[words[:50] for _, words in WORDS])
def test_what_is_wrong_is_said(fields, words):
    with pytest.raises(ConfigError, match=words):
        LoRAConfig(**fields)


def test_defaults_follow_the_evidence():
    config = LoRAConfig()
    assert (config.r, config.alpha, config.dropout, config.init) == (8, 16.0, 0.0, "gaussian")
    assert config.target_modules == "all-linear"


@given(r=st.integers(1, 512), alpha=st.floats(1e-3, 1e4))
def test_scale_is_alpha_by_r_or_by_its_root(r, alpha):
    assert LoRAConfig(r=r).alpha == 2 * r
    assert LoRAConfig(r=r, alpha=alpha).scale(r, alpha) == pytest.approx(alpha / r, rel=1e-15)
    assert LoRAConfig(r=r, alpha=alpha, use_rslora=True).scale(r, alpha) == pytest.approx(alpha * r**-0.5, rel=1e-14)


@given(
    st.builds(
        dict,
        r=st.integers(1, 64),
        alpha=st.none() | st.floats(0.1, 100),
        dropout=st.floats(0, 0.99),
        target_modules=st.sampled_from(["all-linear", r".*\.(q|v)", ["q", "v"]]),
        layers_to_transform=st.none() | st.integers(0, 5) | st.lists(st.integers(0, 5), min_size=1),
        modules_to_save=st.none() | st.just(["head"]),
        rank_pattern=st.dictionaries(st.sampled_from(["a", "b.c"]), st.integers(1, 9)),
        use_rslora=st.booleans(),
    )
)
def test_a_config_survives_as_plain_data(fields):
    slices = {"b": {"of": ["q", "k", "v"], "sizes": [8, 2, 2], "take": ["k", "v"]}, "a": ["v", "q"]}
    for more in ({}, {"use_dora": True, "bias": "all", "dropout_pattern": {"up": 0.5}, "slices": slices}):
        config = LoRAConfig(**fields | more)
        assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True))) == config


def test_a_config_is_frozen_and_keyword_only_and_keeps_no_reference_to_its_caller():
    names, ranks = ["q"], {"q": 2}
    config = LoRAConfig(target_modules=names, rank_pattern=ranks)
    names.append("v")
    ranks["q"] = 4
    assert config.target_modules == ["q"]
    assert config.rank_pattern == {"q": 2}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 4
    with pytest.raises(TypeError):
        LoRAConfig(8)


def test_yaml_nulls_and_sets_are_read_as_meant():
    assert LoRAConfig(rank_pattern=None, alpha_pattern=None) == LoRAConfig()
    assert LoRAConfig(target_modules={"v", "q"}).target_modules == ["q", "v"]
    assert LoRAConfig(target_modules=("q", "q", "v")).target_modules == ["q", "v"]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("targets_modules", "target_modules"), ("aplha", "alpha"), ("R", "r"), ("lora_dora", "use_dora")],
)
def test_an_unknown_field_names_the_nearest(wrong, right):
    with pytest.raises(ConfigError, match=f"no field '{wrong}'.*'{right}'"):
        LoRAConfig.from_dict({wrong: 1})


@given(st.sampled_from(["query", "key_value", "dense_out", "gate_proj"]), st.integers(0, 3), st.sampled_from("xyz"))
def test_near_misses_find_a_word_with_one_letter_wrong(word, at, letter):
    known = ["query", "key_value", "dense_out", "gate_proj", "LayerNorm"]
    assert near_misses(word[:at] + letter + word[at + 1 :], known)[0] == word
    assert near_misses(word[:at] + word[at + 1 :], known)[0] == word
