"""`sweep --together` in two processes, as torchrun starts them: what befalls one of them, and what goes on after it.

That each member is as its own fit there would make it, `tests/training/test_population.py` holds.
"""

from __future__ import annotations

import json

import pytest

from tests.command.process import REPOSITORY
from tests.command.warm import run_all
from tests.sweeps.test_together import GRID, OPTIONS, ended
from tests.training.resuming import differing

STEP = 3
"""In the middle of the first of two epochs, and after the first rung."""
pytestmark = pytest.mark.slow


def sweep(name, tiny, *, fault="", of=None):
    given = ["sweep", "--config", tiny.config, "--config", REPOSITORY / "configs/strategy/ddp.yaml", *OPTIONS, *GRID]
    given += ["--data.init_args.batch_size", 8, "--name", of or name, "--together", "--halving", 2, "--plots", "false"]
    given += ["--trainer.callbacks", "[tests.command.faults.Fault]"]
    return {"name": name, "args": list(map(str, given)), "env": {"FAULT": fault}, "limit": 300}


@pytest.fixture(scope="module")
def played(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    cases = [
        sweep("whole", tiny),
        sweep("asked", tiny, fault=f"term:1:{STEP}"),
        sweep("asked-again", tiny, of="asked"),
        sweep("killed", tiny, fault=f"kill:0,1:{STEP}"),
        sweep("killed-again", tiny, of="killed"),
        sweep("gone", tiny, fault=f"kill:1:{STEP}"),
        sweep("error", tiny, fault=f"error:1:{STEP}"),
    ]
    return {**run_all(cases, folder, timeout=1800), "folder": folder / "runs"}


def test_both_processes_drop_the_same_and_the_first_alone_says_so(played):
    decisions = json.loads((played["folder"] / "whole/halving.json").read_text())
    assert any(decision["dropped"] for decision in decisions)
    assert "pruned: r = 4, lr = 3" in played["whole"].said[0]
    assert "lr" not in played["whole"].said[1]
    assert [p.name for p in played["folder"].glob("whole/*/version_*")] == ["version_0"] * 4


@pytest.mark.parametrize(("name", "codes"), [("asked", [143, 0]), ("killed", [-9, -9])])
def test_a_population_in_two_processes_that_is_interrupted_goes_on_to_the_same_bytes(played, name, codes):
    assert played[name].codes == codes, played[name]
    assert played[f"{name}-again"].codes == [0, 0], played[f"{name}-again"]
    whole, again = (played["folder"] / run for run in ("whole", name))
    assert (again / "halving.json").read_text() == (whole / "halving.json").read_text()
    for member in whole.glob("0*"):
        if (member / "version_0/checkpoints").is_dir():
            assert differing(ended(member), ended(again / member.name)) == [], member.name


def test_what_befalls_one_process_alone_ends_both(played):
    """They would wait for each other else, in the middle of a member's step."""
    assert played["gone"].codes == [2, -9], played["gone"]
    assert "go on" not in played["gone"].said[0]
    assert "all processes stop" in played["gone"].said[0]
    assert 0 not in played["error"].codes, played["error"]
    assert "a fault of one's own" in played["error"].everything
    assert "hangs" not in played["error"].codes
