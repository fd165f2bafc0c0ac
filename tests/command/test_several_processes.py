"""Laws 2, 4 and 8 with several processes, through the command: what stops one stops all.

The processes are forked from one that has imported all, with the environment that torchrun sets, and each case is a run
of the command in two of them. Where a fault falls, `tests/command/faults.py` says.
"""

import csv

import pytest

from lora_lightning.training.run import load_checkpoint
from tests.command.process import REPOSITORY
from tests.command.warm import run_all
from tests.training.resuming import differing

OVERLAY = REPOSITORY / "configs/strategy/ddp.yaml"
MIDDLE = 4
"""Optimizer steps, in the middle of the second of three epochs of three."""


def fit(tiny, name, *args, fault="", count=2, launcher="torchrun", of=None):
    """A case: three epochs of three steps, with dropout, shuffling and accumulation."""
    given = ["fit", "--config", tiny.config, "--config", OVERLAY, "--name", of or name, "--trainer.devices", count]
    given += ["--trainer.max_epochs", 3, "--model.lora.dropout", 0.2, "--data.init_args.batch_size", 16 // count]
    given += ["--trainer.accumulate_grad_batches", 3, "--trainer.log_every_n_steps", 1]
    given += ["--trainer.callbacks", "[tests.command.faults.Fault]", *args]
    env = {"FAULT": fault}
    return {"name": name, "args": list(map(str, given)), "count": count, "launcher": launcher, "env": env}


def interrupted(tiny, name, fault, *args, count=2):
    """A case that is interrupted, and the same command started again."""
    again = fit(tiny, f"{name}-again", *args, "--ckpt_path", "auto", count=count, of=name)
    return [fit(tiny, name, *args, fault=fault, count=count), again]


def end_of(folder, name):
    """Adapter, optimizer and the log's rows of the only version of a run."""
    assert [p.name for p in (folder / "runs" / name).glob("version_*")] == ["version_0"]
    run = folder / "runs" / name / "version_0"
    content = load_checkpoint(run / "checkpoints" / "last.ckpt")
    moments = content["optimizer_states"][0]["state"]
    flat = {f"{i}.{key}": value for i, state in moments.items() for key, value in state.items()}
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {**content["state_dict"], **flat, "step": content["global_step"], "rows": rows}


def errors(played):
    return [line for line in played.everything.splitlines() if "error:" in line]


@pytest.fixture(scope="module")
def played(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    cases = [
        fit(tiny, "whole"),
        *interrupted(tiny, "killed", f"kill:0,1:{MIDDLE}", "--save_every", "1"),
        *interrupted(tiny, "asked", f"term:1:{MIDDLE}"),
        fit(tiny, "nan", fault=f"nan:1:{MIDDLE}"),
        fit(tiny, "w0", fault=f"w0:1:{MIDDLE}"),
        fit(tiny, "gradient", fault="gradient:1:0"),
        fit(tiny, "disk", fault=f"disk:0:{MIDDLE}"),
        fit(tiny, "gone", fault=f"kill:1:{MIDDLE}"),
        fit(tiny, "stuck", fault=f"stuck:0:{MIDDLE}+error:1:{MIDDLE}"),
    ]
    return {**run_all(cases, folder), "folder": folder}


@pytest.mark.parametrize("name", ["killed", "asked"])
def test_a_run_in_two_processes_that_is_interrupted_ends_as_if_it_had_not_been(played, name):
    codes = {"killed": [-9, -9], "asked": [75, 0]}
    assert played["whole"].codes == [0, 0], played["whole"]
    assert played[name].codes == codes[name], played[name]
    assert played[f"{name}-again"].codes == [0, 0], played[f"{name}-again"]
    whole, again = end_of(played["folder"], "whole"), end_of(played["folder"], name)
    assert whole["step"] == 9
    assert differing(whole, again) == []


def test_sigterm_to_one_process_is_told_once_and_saves_once(played):
    assert played["asked"].everything.count("goes on from there") == 1
    assert f"after step {MIDDLE + 1}" in played["asked"].said[0]


STOPS = {
    "nan": r"rank 1.*the loss of optimizer step 5 is not finite: .* rows .* 'bert.encoder.layer.1.output.dense'",
    "w0": "W0 moved during fit: 1 frozen tensors changed, first 'bert.embeddings.word_embeddings.weight'",
    "gradient": "2 of 28 trainable tensors got no gradient in the first backward",
    "disk": "could not be written .*: make room there",
    "gone": "another process is gone: all processes stop; --ckpt_path last",
}


@pytest.mark.parametrize("name", STOPS)
def test_what_goes_wrong_in_one_process_stops_all_with_one_line(played, name):
    import re

    case = played[name]
    assert case.codes == ([2, -9] if name == "gone" else [2, 2]), case
    assert len(errors(case)) == 1, case
    assert re.search(STOPS[name].removeprefix("rank 1.*"), errors(case)[0]), case
    assert max(case.seconds) < 60, case


def test_a_process_that_is_stuck_ends_when_another_fails(played):
    """As in NCCL's collectives, which know nothing of a process that is gone."""
    case = played["stuck"]
    assert case.codes == [2, 1], case
    assert "a fault of one's own" in case.said[1]
