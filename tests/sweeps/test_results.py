"""A sweep's table, figures and page, from trials that are made up."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
from PIL import Image

from lora_lightning.commands.sweep.figures import figures
from lora_lightning.commands.sweep.ranking import rank_points
from lora_lightning.commands.sweep.report import NOT_TEST, table, write
from lora_lightning.commands.sweep.search_space import MATRICES, RANK
from lora_lightning.commands.sweep.study import Trial, folder_name
from lora_lightning.reports import figures as drawing

METRIC = "val/accuracy"


def trial(number, values, value, *, seed=None, state="complete", trainable=1000):
    told = {"state": state, "value": value, "trainable": trainable, "seconds": 90.0, "run": f"runs/{number}"}
    return Trial(number=number, name=folder_name(number, values, seed), values=values, seed=seed, **told)


def over_ranks(*, seeds=(None,), sets=("[query]", "[query, value]")):
    """Value 0.5 + r / 1000 for one matrix, 0.1 more for two, a hundredth up or down by seed."""
    points = [(matrices, r, seed) for matrices in sets for r in (1, 2, 8, 64) for seed in seeds]
    return [
        trial(n, {MATRICES: m, RANK: str(r)}, 0.5 + r / 1000 + 0.1 * (m == sets[-1]) + (seed or 0) / 100, seed=seed)
        for n, (m, r, seed) in enumerate(points)
    ]


def test_equal_points_are_ranked_by_what_they_train_and_the_table_says_that_the_test_set_was_not_used():
    trials = [
        trial(0, {RANK: "8"}, 0.9, trainable=800),
        trial(1, {RANK: "1"}, None, state="failed"),
        trial(2, {RANK: "2"}, 0.95, state="pruned"),
        trial(3, {RANK: "4"}, 0.9, trainable=400),
        trial(4, {RANK: "16"}, None),
    ]
    assert [point.values[RANK] for point in rank_points(trials, "max")] == ["4", "8", "16", "2", "1"]
    seeds = [trial(0, {RANK: "1"}, 0.9, seed=1), trial(1, {RANK: "1"}, None, seed=2, state="failed")]
    seeds += [trial(2, {RANK: "2"}, 0.5, seed=1), trial(3, {RANK: "2"}, 0.7, seed=2)]
    seeds += [trial(4, {RANK: "4"}, 0.9, seed=1), trial(5, {RANK: "4"}, None, seed=2)]
    assert [point.values[RANK] for point in rank_points(seeds, "max")] == ["2", "4", "1"]
    rows = table("sweep", rank_points(over_ranks(seeds=(1, 2)), "max"), [MATRICES, RANK], METRIC, "max")
    assert rows.header == ["", "target_modules", "r", METRIC, "sd", "n", "trainable", "minutes", "folder"]
    assert rows.rows[0][:6] == ["1", "query, value", "64", "0.6790", "0.0071", "2"]
    assert NOT_TEST in rows.note


def drawn(trials, keys, budget=None, rungs=()):
    return figures(rank_points(trials, "max"), keys, METRIC, budget, rungs)


def test_rank_against_matrices_is_table_6_with_every_mean_written_in_it():
    found = drawn(over_ranks(), [MATRICES, RANK])
    assert list(found) == ["rank"]
    _, caption, figure = found["rank"]
    assert "Table 6" in caption
    lines, cells = figure.axes
    assert [line.get_label() for line in lines.containers] == ["query", "query, value"]
    assert {text.get_text() for text in cells.texts} == {f"{t.value:.3f}" for t in over_ranks()}


def test_matrices_at_a_budget_are_table_5_with_bars_between_seeds():
    trials = [
        trial(n, {MATRICES: m, RANK: r}, 0.5 + n / 100 + seed / 10, seed=seed, trainable=300_290)
        for n, (m, r) in enumerate([("[query]", "65"), ("[query, value]", "32")])
        for seed in (1, 2)
    ]
    (_, caption, figure) = drawn(trials, [MATRICES, RANK], budget=300_000)["matrices"]
    assert "nearest to 300,000 parameters" in caption
    assert "standard deviation" in caption
    (axis,) = figure.axes
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["query\nr = 65\n300K", "query, value\nr = 32\n300K"]
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([0.65, 0.66])


def test_other_flags_have_a_figure_each_and_of_them_the_best_is_in_the_others():
    lr = "model.optimizer.init_args.lr"
    trials = [trial(n, {RANK: r, lr: x}, v) for n, (r, x, v) in enumerate([("1", "1e-4", 0.5), ("1", "1e-2", 0.7)])]
    found = drawn(trials, [RANK, lr])
    assert set(found) == {"rank", "lr"}
    assert "the best is shown" in found["rank"][1]
    (axis,) = found["lr"][2].axes
    assert axis.get_xscale() == "log"


def test_all_files_are_written_and_figures_of_an_earlier_state_go(tmp_path):
    about = {"metric": METRIC, "goal": "max", "budget": None, "keys": [MATRICES, RANK], "config": {}}
    write(tmp_path, about, rank_points(over_ranks(), "max"), plots=True)
    assert {p.name for p in tmp_path.iterdir()} == {"index.html", "sweep.json", "sweep.csv", "rank.png", "rank.svg"}
    assert Image.open(io.BytesIO((tmp_path / "rank.png").read_bytes())).width > 1000
    page = (tmp_path / "index.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "0.6640" in page
    assert json.loads((tmp_path / "sweep.json").read_text())["pictures"] == ["rank.png", "rank.svg"]
    write(tmp_path, about, rank_points(over_ranks(), "max"), plots=False)
    assert {p.name for p in tmp_path.iterdir()} == {"index.html", "sweep.json", "sweep.csv"}


def test_missing_matplotlib_is_said_with_both_ways_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'lora_lightning\[plots\]'.*--plots false"):
        drawing.refuse_missing()


def test_halving_is_drawn_with_who_was_dropped_where():
    states = {"1": "pruned", "4": "pruned", "8": "complete", "16": "failed"}
    trials = [trial(n, {RANK: r}, 0.7, state=state) for n, (r, state) in enumerate(states.items())]
    names = [one.name for one in trials]
    rungs = [
        {"rung": "1/4", "step": 2, "values": dict.fromkeys(names, 0.5), "dropped": {names[0]: "why"}},
        {"rung": "1/2", "step": 4, "values": dict.fromkeys(names[1:], 0.6), "dropped": {names[1]: "why"}},
    ]
    (axis,) = drawn(trials, [RANK], rungs=rungs)["halving"].figure.axes
    ends = {line.get_label(): float(line.get_xdata()[-1]) for line in axis.lines}
    wanted = {"r = 1, dropped at 1/4": 0.25, "r = 4, dropped at 1/2": 0.5, "r = 8": 1.0, "r = 16": 0.5}
    assert ends.items() >= wanted.items()
    assert axis.get_xticklabels()[0].get_text() == "1/4, 2 steps\n4 members, 3 stay"
