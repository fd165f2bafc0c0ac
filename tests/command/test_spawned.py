"""`ddp-fork.yaml` and `--trainer.strategy ddp_spawn` through the command: what stops a child is told by the parent."""

import re

import pytest

from tests.command.process import REPOSITORY
from tests.command.test_several_processes import MIDDLE, STOPS, end_of, errors, fit, interrupted
from tests.command.warm import run_all
from tests.training.resuming import differing

pytestmark = pytest.mark.slow

FORK = {"count": 1, "launcher": "none", "overlay": REPOSITORY / "configs/strategy/ddp-fork.yaml"}
"""One process, which starts two."""
TWO = ["--trainer.devices", 2, "--data.init_args.batch_size", 8]
SPAWN = [*TWO, "--trainer.strategy", "ddp_spawn"]


@pytest.fixture(scope="module")
def forked(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forked")
    cases = [
        fit(tiny, "whole", *TWO, **FORK),
        *interrupted(tiny, "asked", f"asked:1:{MIDDLE}", *TWO, **FORK),
        fit(tiny, "nan", *TWO, fault=f"nan:1:{MIDDLE}", **FORK),
        fit(tiny, "gone", *TWO, fault=f"kill:1:{MIDDLE}", **FORK),
        fit(tiny, "early", *TWO, fault="asked:0:-1", **FORK),
    ]
    return {**run_all(cases, folder), "folder": folder}


def test_sigterm_to_the_parent_saves_in_all_children_and_asks_to_be_started_again(forked):
    assert forked["asked"].codes == [75], forked["asked"]
    assert forked["asked"].everything.count("goes on from there") == 1
    for name in ("whole", "asked-again"):
        assert forked[name].codes == [0], forked[name]
    whole, again = end_of(forked["folder"], "whole"), end_of(forked["folder"], "asked")
    assert whole["step"] == 9
    assert differing(whole, again) == []


def test_sigterm_before_training_ends_all(forked):
    assert forked["early"].codes == [143], forked["early"]
    assert "Traceback" not in forked["early"].everything


def test_what_stops_a_forked_process_is_told_in_one_line(forked):
    told = {"nan": STOPS["nan"].removeprefix("rank 1.*"), "gone": r"process 1 was ended by SIGKILL"}
    for name, text in told.items():
        assert forked[name].codes == [2], forked[name]
        (line,) = errors(forked[name])
        assert re.search(text, line), line
        assert "Traceback" not in forked[name].everything, forked[name]


@pytest.fixture(scope="module")
def spawned(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spawned")
    given = {"count": 1, "launcher": "none"}
    cases = [
        fit(tiny, "whole", *TWO, **FORK),
        *interrupted(tiny, "asked", f"asked:0:{MIDDLE}", *SPAWN, **given),
        fit(tiny, "nan", *SPAWN, fault=f"nan:1:{MIDDLE}", **given),
    ]
    for case in cases:
        case["limit"] = 240.0  # each process imports all by itself
    return {**run_all(cases, folder), "folder": folder}


def test_spawned_processes_train_as_forked_ones_also_where_sigterm_came_between(spawned):
    assert [spawned[name].codes for name in ("whole", "asked", "asked-again")] == [[0], [75], [0]], spawned["asked"]
    ends = [end_of(spawned["folder"], name) for name in ("whole", "asked")]
    assert differing(*ends) == []


def test_what_stops_a_spawned_process_is_told_in_one_line(spawned):
    assert spawned["nan"].codes == [2], spawned["nan"]
    (line,) = errors(spawned["nan"])
    assert "the loss of optimizer step 5 is not finite" in line
