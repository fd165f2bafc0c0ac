"""How what is swept is written, and what is refused in one line before anything is opened."""

from __future__ import annotations

import pytest
from optuna.distributions import FloatDistribution, IntDistribution

from lora_lightning import LoRAError
from lora_lightning.cli.parser import command_parser
from lora_lightning.commands.sweep import search_space as space
from lora_lightning.commands.sweep.search_space import grid_points, parse_grid, parse_range, parse_space
from lora_lightning.commands.sweep.study import folder_name
from lora_lightning.commands.sweep.sweep import Request

SETS = "model.lora.target_modules=[query],[query,value],all-linear"


def test_a_comma_in_brackets_or_quotes_belongs_to_its_value():
    assert parse_grid(SETS)[1].choices == ("[query]", "[query,value]", "all-linear")
    assert parse_grid("x={r: 1, alpha: 2},{r: 2, alpha: 2}")[1].choices == ("{r: 1, alpha: 2}", "{r: 2, alpha: 2}")
    assert parse_grid("x='.*(a,b)',x")[1].choices == ("'.*(a,b)'", "x")
    found = [tuple(point.values()) for point in grid_points(parse_space(["a.b=1,2", "c=x,y,z"], []))]
    assert found == [(a, c) for a in "12" for c in "xyz"], "every combination once, and the last flag changes first"


def test_a_range_is_no_grid_and_is_whole_where_both_ends_are():
    assert parse_range("model.lora.r=1..64") == ("model.lora.r", IntDistribution(1, 64))
    assert parse_range("x.lr=1e-4..1e-2:log") == ("x.lr", FloatDistribution(1e-4, 1e-2, log=True))
    assert parse_range("x.dropout=0..0.5")[1] == FloatDistribution(0, 0.5)
    with pytest.raises(LoRAError, match="has no grid: give --sampler random or tpe"):
        grid_points(parse_space([], ["model.lora.r=1..4"]))


def test_names_are_as_short_as_they_can_be_and_a_folder_tells_its_values():
    keys = ["model.lora.r", "data.init_args.lr", "model.optimizer.lr"]
    assert list(space.short_names(keys).values()) == ["lora.r", "init_args.lr", "optimizer.lr"]
    values = {"model.lora.r": "4", "model.lora.target_modules": "[query, value]"}
    assert folder_name(3, values, seed=2) == "003_r-4_target_modules-query-value_seed-2"
    assert space.readable_value("[query,value]") == "query, value"
    assert "/" not in folder_name(0, {"data.path": "../../x"}, None)


MISTAKES = {
    "a sweep needs something to sweep": {"grid": []},
    "expected a flag of fit and its values, such as model.lora.r=1,2,4,8": {"grid": ["model.lora.r"]},
    "one of them is empty": {"grid": ["model.lora.r=1,,2"]},
    "a value is there twice; for repeats give --seeds": {"grid": ["model.lora.r=1,1"]},
    "'model.lora.r' is swept twice": {"grid": ["model.lora.r=1", "model.lora.r=2"]},
    "say it with --seeds": {"grid": ["seed_everything=1,2"]},
    "expected KEY=LOW..HIGH or KEY=LOW..HIGH:log": {"ranges": ["model.lora.r=1-4"], "sampler": "tpe", "trials": 2},
    "expected LOW below HIGH, both above 0 for log": {"ranges": ["x=0..1:log"], "sampler": "tpe", "trials": 2},
    "--trials is for --sampler random or tpe": {"trials": 4},
    "--sampler tpe needs --trials N": {"sampler": "tpe"},
    "jobs must be at least 1, got 0": {"jobs": 0},
    "seeds are to differ, got 1, 1": {"seeds": [1, 1]},
    "so that the test set can still judge; got test/accuracy": {"metric": "test/accuracy"},
    "leave model.lora.r out of --grid and --range": {"budget": 1000, "grid": [SETS, "model.lora.r=1,2"]},
    "give --together": {"halving": 2},
    "halving must be at least 2": {"halving": 1, "together": True},
    "leave --jobs, --seeds out": {"together": True, "jobs": 2, "seeds": [1, 2]},
    "--budget compares sets of matrices": {"budget": 1000, "grid": ["model.lora.dropout=0,0.1"]},
}


@pytest.mark.parametrize("told", MISTAKES)
def test_a_mistake_is_told_in_one_line(told):
    with pytest.raises(LoRAError) as raised:
        Request(**{"fit": ["-c", "x.yaml"], "grid": ["model.lora.r=1,2"], **MISTAKES[told]})
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_without_optuna_a_sweep_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'lora_lightning\[sweeps\]'"):
        Request(fit=["-c", "x.yaml"], grid=["model.lora.r=1,2"])


def test_the_command_keeps_its_own_options_and_hands_all_others_on_in_their_order():
    words = ["-c", "a.yaml", "--grid", "model.lora.r=1,2", SETS, "--jobs", "2"]
    words += ["--trainer.max_epochs", "1", "-c=b.yaml"]
    words += ["--grid=model.lora.dropout=0,0.1", "--model.lora.alpha=null", "--seeds", "1,2", "--jobs=3"]
    given = command_parser("sweep").parse_args(words)
    assert given.grid == ["model.lora.r=1,2", SETS, "model.lora.dropout=0,0.1"]
    assert (given.jobs, given.seeds) == (3, "1,2")
    assert given.fit == ["-c", "a.yaml", "--trainer.max_epochs", "1", "-c=b.yaml", "--model.lora.alpha=null"]
