"""`sweep --together`: the points of a grid in one process over one W0, each as a fit of its own would make it."""

from __future__ import annotations

import html
import json
import random
import re
import subprocess

import pytest
import torch

from tests.command.process import COMMAND, command, logged_rows, mistake, run
from tests.training.resuming import differing

GRID = ("--grid", "model.lora.r=1,4", "--grid", "model.optimizer.init_args.lr=1e-2,3")
OPTIONS = (
    *("--trainer.max_epochs", "2", "--model.lora.dropout", "0.1", "--trainer.gradient_clip_val", "0.5"),
    *("--trainer.accumulate_grad_batches", "2", "--data.init_args.eval_batch_size", "4", "--save_every", "2"),
)
TOGETHER = (*OPTIONS, *GRID, "--together", "--halving", "2", "--plots", "false")


def ended(folder):
    """The adapter that a fit has left, and its optimizer's state."""
    found = torch.load(folder / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    states = found["optimizer_states"][0]["state"].items()
    return found["state_dict"] | {f"{i}.{key}": value for i, state in states for key, value in state.items()}


@pytest.fixture(scope="module")
def sweep(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    done = run("sweep", "--config", tiny.config, *TOGETHER, cwd=folder)
    return folder / "runs" / "tiny-sweep", done.stdout


def test_each_member_ends_in_the_bits_of_its_own_fit(sweep, tiny, tmp_path):
    """Its adapter, its optimizer's moments and its log."""
    folder, _ = sweep
    flags = ["--model.lora.r", 4, "--model.optimizer.init_args.lr", "1e-2", "--name", "own"]
    run("fit", "--config", tiny.config, *OPTIONS, *flags, cwd=tmp_path)
    member = next(folder.glob("*r-4_lr-1e-2"))
    assert differing(ended(member), ended(tmp_path / "runs" / "own")) == []
    logs = [next(place.rglob("metrics.csv")) for place in (member, tmp_path / "runs" / "own")]
    assert logged_rows(logs[0]) == logged_rows(logs[1])


def test_a_member_is_an_ordinary_run(sweep, monkeypatch):
    folder, said = sweep
    member = next(folder.glob("*r-4_lr-1e-2"))
    monkeypatch.chdir(folder.parents[1])
    command(monkeypatch, "test", "--ckpt_path", member)
    command(monkeypatch, "export", "--ckpt_path", member, "--formats", "adapter")
    assert (member / "version_0" / "export" / "adapter" / "adapter_model.safetensors").is_file()
    assert (member / "version_0" / "report.html").is_file()
    assert "enable_progress_bar: false" in (member / "version_0" / "config.yaml").read_text()  # the config's own
    assert "4 fits" in said


def test_the_record_says_who_stood_where_and_a_dropped_members_page_at_which_rung_and_value(sweep):
    folder, _ = sweep
    decisions = json.loads((folder / "halving.json").read_text())
    assert [decision["rung"] for decision in decisions] == ["1/8", "1/4", "1/2"]
    assert {decision["metric"] for decision in decisions} == {"val/accuracy"}
    ranking = json.loads((folder / "sweep.json").read_text())["ranking"]
    gone = {name: reason for decision in decisions for name, reason in decision["dropped"].items()}
    states = {trial["name"]: trial["state"] for point in ranking for trial in point["trials"]}
    assert {name for name, state in states.items() if state == "pruned"} == gone.keys()
    name, reason = next(iter(gone.items()))
    assert re.match(r"at rung 1/[248], after \d+ steps, val/accuracy 0\.\d{4}: ", reason)
    (version,) = (folder / name).glob("version_*")
    assert json.loads((version / "report.json").read_text())["dropped"] == reason
    assert f"Its sweep dropped it {reason}" in html.unescape((version / "report.html").read_text())


TWO_RANKS = ["--grid", "model.lora.r=1,2"]
REFUSED = [
    (["--grid", "data.init_args.batch_size=8,16"], "'data.init_args.batch_size' cannot differ"),
    (["--grid", "trainer.precision=32-true,bf16-mixed"], "'trainer.precision' cannot differ"),
    (["--grid", "trainer.max_epochs=1,2"], "'trainer.max_epochs' cannot.*lora-lightning sweep --.* --grid trainer"),
    ([*TWO_RANKS, "--seeds", "1,2"], "leave --seeds out"),
    ([*TWO_RANKS, "--trainer.strategy", "ddp_fork"], "forks its processes for each"),
    ([*TWO_RANKS, "--trainer.strategy", "fsdp2"], "shards W0 for each: take strategy ddp"),
]


@pytest.mark.parametrize(("flags", "said"), REFUSED)
def test_what_one_fit_cannot_have_is_refused_by_name(flags, said, tiny, monkeypatch, capsys):
    line = mistake(monkeypatch, capsys, "sweep", "--config", tiny.config, "--together", "--plots", "false", *flags)
    assert re.search(said, line)


def test_other_rungs_than_those_that_were_decided_at_are_refused(sweep, tiny, monkeypatch, capsys):
    folder, _ = sweep
    monkeypatch.chdir(folder.parents[1])
    line = mistake(monkeypatch, capsys, "sweep", "--config", tiny.config, *TOGETHER, "--rungs", "1/2")
    assert "another together.rungs" in line


def test_who_was_dropped_before_a_kill_is_recorded_and_not_fitted(tiny, tmp_path, monkeypatch):
    """The decision stands, and the process was killed before the study knew of it."""
    (tmp_path / "runs" / "tiny-sweep").mkdir(parents=True)
    names = ["000_r-1_lr-1e-2", "001_r-1_lr-3", "002_r-4_lr-1e-2", "003_r-4_lr-3"]
    decision = {"rung": "1/8", "step": 1, "dropped": dict.fromkeys(names, "rung 1: behind")}
    (tmp_path / "runs" / "tiny-sweep" / "halving.json").write_text(json.dumps([decision]))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):  # none came to its end
        command(monkeypatch, "sweep", "--config", tiny.config, *TOGETHER)
    ranking = json.loads((tmp_path / "runs/tiny-sweep/sweep.json").read_text())["ranking"]
    assert [point["state"] for point in ranking] == ["pruned"] * 4
    assert not list((tmp_path / "runs" / "tiny-sweep").rglob("*.ckpt"))


def test_a_member_whose_loss_is_not_finite_ends_alone_and_by_name(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = ["--grid", "model.optimizer.init_args.lr=1e-2,1e30", "--together", "--plots", "false"]
    command(monkeypatch, "sweep", "--config", tiny.config, *OPTIONS, *grid)
    ranking = json.loads((tmp_path / "runs/tiny-sweep/sweep.json").read_text())["ranking"]
    trials = {point["values"]["model.optimizer.init_args.lr"]: point["trials"][0] for point in ranking}
    assert trials["1e-2"]["state"] == "complete"
    assert trials["1e30"]["state"] == "failed"
    assert "finite" in trials["1e30"]["error"]


@pytest.mark.slow
def test_a_population_that_is_killed_goes_on_to_the_same_bytes(sweep, tiny, tmp_path):
    folder, _ = sweep
    options = ["--config", tiny.config, *TOGETHER]
    rng = random.Random(0)
    for _ in range(6):
        with subprocess.Popen([str(COMMAND), "sweep", *map(str, options)], cwd=tmp_path) as process:
            try:
                process.wait(timeout=8 + 12 * rng.random())
            except subprocess.TimeoutExpired:
                process.kill()
    run("sweep", *options, cwd=tmp_path)
    again = tmp_path / "runs" / "tiny-sweep"
    assert (again / "halving.json").read_text() == (folder / "halving.json").read_text()
    for member in folder.glob("0*"):
        assert differing(ended(member), ended(again / member.name)) == [], member.name
