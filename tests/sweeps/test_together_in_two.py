"""`sweep --together` in two processes, as torchrun starts them: each member as a fit of its own there would make it."""

from __future__ import annotations

import json

import pytest

from tests.command.process import REPOSITORY, logged_rows
from tests.command.warm import run_all
from tests.sweeps.test_together import OPTIONS, same

STEP = 3
"""In the middle of the first of two epochs, and after the first rung."""
pytestmark = pytest.mark.slow


def case(command, name, tiny, *args, fault="", of=None):
    given = [command, "--config", tiny.config, "--config", REPOSITORY / "configs/strategy/ddp.yaml", *OPTIONS]
    given += ["--data.init_args.batch_size", 8, "--name", of or name]
    given += ["--trainer.callbacks", "[tests.command.faults.Fault]", *args]
    return {"name": name, "args": list(map(str, given)), "env": {"FAULT": fault}}


def sweep(name, tiny, rates="1e-2,3", **options):
    grid = ["--grid", "model.lora.r=1,4", "--grid", f"model.optimizer.init_args.lr={rates}"]
    return case("sweep", name, tiny, *grid, "--together", "--halving", 2, "--plots", "false", **options)


@pytest.fixture(scope="module")
def played(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    own = ["--model.lora.r", 4, "--model.optimizer.init_args.lr", "1e-2"]
    cases = [
        sweep("whole", tiny),
        case("fit", "own", tiny, *own),
        sweep("asked", tiny, fault=f"term:1:{STEP}"),
        sweep("asked-again", tiny, of="asked"),
        sweep("killed", tiny, fault=f"kill:0,1:{STEP}"),
        sweep("killed-again", tiny, of="killed"),
        sweep("gone", tiny, fault=f"kill:1:{STEP}"),
        sweep("error", tiny, fault=f"error:1:{STEP}"),
        sweep("nan", tiny, rates="1e-2,1e30"),
    ]
    return {**run_all(cases, folder), "folder": folder / "runs"}


def test_each_member_ends_in_the_bits_of_its_own_fit_in_two_processes(played):
    assert played["whole"].codes == played["own"].codes == [0, 0], played["whole"]
    (member,) = played["folder"].glob("whole/*r-4_lr-1e-2")
    assert same(member, played["folder"] / "own")
    logs = [next(place.rglob("metrics.csv")) for place in (member, played["folder"] / "own")]
    assert logged_rows(logs[0]) == logged_rows(logs[1])


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
    assert (played["folder"] / name / "halving.json").read_text() == (
        played["folder"] / "whole/halving.json"
    ).read_text()
    for member in played["folder"].glob("whole/0*"):
        if (member / "version_0/checkpoints").is_dir():
            assert same(member, played["folder"] / name / member.name), member.name


def test_what_befalls_one_process_alone_ends_both(played):
    """They would wait for each other else, in the middle of a member's step."""
    assert played["gone"].codes == [2, -9], played["gone"]
    assert "go on" not in played["gone"].said[0]
    assert "all processes stop" in played["gone"].said[0]
    assert 0 not in played["error"].codes, played["error"]
    assert "a fault of one's own" in played["error"].everything
    assert max(played["error"].seconds) < 60


def test_what_ends_one_member_in_both_processes_ends_that_one_alone(played):
    assert played["nan"].codes == [0, 0], played["nan"]
    ranking = json.loads((played["folder"] / "nan/sweep.json").read_text())["ranking"]
    states = {point["values"]["model.optimizer.init_args.lr"]: point["state"] for point in ranking}
    assert states == {"1e-2": "complete", "1e30": "failed"}
