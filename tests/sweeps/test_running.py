"""What a sweep does with its fits: ranks, goes on, gives up, divides the machine, and ends what it started."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from statistics import fmean, stdev

import pytest

from lora_lightning import LoRAError
from lora_lightning.commands.sweep.fits import Stopped, shares
from tests.sweeps.quick import events, placed, plan, run, sweep

LEVELS = {"1": 0.3, "2": 0.7, "4": 0.5}


def test_points_are_ranked_and_written_and_a_fit_whose_end_was_not_noted_is_not_run_again(tmp_path):
    file = plan(tmp_path, level=LEVELS)
    outcome, _ = run(file)
    told = json.loads((outcome.folder / "sweep.json").read_text())["ranking"]
    assert [point["trainable"] for point in told] == [200, 400, 100]
    with (outcome.folder / "sweep.csv").open() as file:
        rows = [(row["model.lora.r"], float(row["val/accuracy"])) for row in csv.DictReader(file)]
    assert rows == [(point["values"]["model.lora.r"], point["mean"]) for point in told]
    (outcome.folder / "study.log").unlink()  # as of a sweep that is killed between a fit's end and its record
    again, said = run(file)
    assert said == [("ends", r, "complete") for r in ("1", "2", "4")]
    assert len(events(tmp_path, "begins")) == 3
    assert placed(again) == [2, 4, 1]


def test_a_loss_is_best_where_it_is_smallest_and_which_end_is_must_be_said(tmp_path):
    outcome, _ = run(plan(tmp_path, level=LEVELS), metric="val/loss", goal="min")
    assert placed(outcome) == [2, 4, 1]
    assert outcome.points[0].mean < outcome.points[1].mean
    with pytest.raises(LoRAError, match=r"is not what the config monitors \(val/accuracy\): say --mode min or max"):
        sweep(plan(tmp_path), metric="val/loss")
    outcome, _ = run(plan(tmp_path), metric="val/f1", goal="max", name="f1")
    assert {point.state for point in outcome.points} == {"failed"}
    assert "ended without val/f1" in outcome.points[0].trials[0].error


def test_a_fit_that_fails_is_told_in_its_line_and_the_same_command_runs_only_it(tmp_path):
    outcome, said = run(plan(tmp_path, level=LEVELS, fails=["2"]))
    assert placed(outcome) == [4, 1]
    assert [s[1:] for s in said if s[0] == "ends"] == [("1", "complete"), ("2", "failed"), ("4", "complete")]
    assert outcome.points[-1].trials[0].error == "r is too large, as was planned"
    outcome, said = run(plan(tmp_path, level=LEVELS))
    assert [s[1] for s in said] == ["2", "2"]
    assert placed(outcome) == [2, 4, 1]
    assert outcome.points[0].trials[0].error is None


def test_other_values_and_more_seeds_add_trials_and_another_config_is_refused(tmp_path):
    file = plan(tmp_path, level=LEVELS)
    run(file, config={"trainer": {"max_epochs": 2}})
    outcome, said = run(file, grid=["model.lora.r=4,8"], config={"trainer": {"max_epochs": 2}})
    assert {s[1] for s in said} == {"8"}
    assert sorted(placed(outcome)) == [1, 2, 4, 8]
    for storage in (None, str(tmp_path / "new.log")):  # of a new study, too, where the fits are an old one's
        with pytest.raises(LoRAError, match=r"another trainer\.max_epochs \(2, now 3\): give another --name"):
            run(file, config={"trainer": {"max_epochs": 3}}, storage=storage)
    with pytest.raises(LoRAError, match="another keys"):
        run(file, grid=["model.lora.r=1", "model.lora.dropout=0.1"], config={"trainer": {"max_epochs": 2}})


def test_seeds_give_a_mean_and_a_deviation_by_which_points_are_ranked(tmp_path):
    outcome, _ = run(plan(tmp_path, level=LEVELS), seeds=[1, 2, 3])
    assert placed(outcome) == [2, 4, 1]
    for point in outcome.points:
        own = {trial.seed: trial.value for trial in point.trials}
        assert own.keys() == {1, 2, 3}
        assert point.mean == pytest.approx(fmean(own.values()))
        assert point.sd == pytest.approx(stdev(own.values())) != 0
    assert [e["seed"] for e in events(tmp_path, "begins")] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_two_jobs_run_at_once_on_half_of_the_cores_each(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    outcome, _ = run(plan(tmp_path, level=LEVELS, pause=0.5), jobs=2)
    assert placed(outcome) == [2, 4, 1]
    begun, ended = ({e["r"]: e["at"] for e in events(tmp_path, what)} for what in ("begins", "ends"))
    assert begun["2"] < ended["1"]
    assert begun["4"] > min(ended["1"], ended["2"])  # never three
    assert {e["threads"] for e in events(tmp_path)} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}


def test_each_of_several_jobs_has_its_part_of_the_gpus():
    def gpus(jobs, count, **env):
        return [share.get("CUDA_VISIBLE_DEVICES") for share in shares(jobs, count, env)]

    assert gpus(1, 4) == [None]
    assert gpus(2, 4) == ["0,2", "1,3"]
    assert gpus(3, 2) == ["0", "1", "0"]
    assert gpus(2, 2, CUDA_VISIBLE_DEVICES="5,7") == ["5", "7"]
    assert gpus(2, 0) == [None, None]


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_a_pruner_ends_fits_that_fall_behind(tmp_path, pruner):
    levels = {"1": 0.8, "2": 0.9, "4": 0.01, "8": 0.02, "16": 0.03}
    file = plan(tmp_path, level=levels, validations=12, pause=0.1)
    asked = {"grid": ["model.lora.r=1,2,4,8,16"], "pruner": pruner, "name": "sweep"}
    outcome, _ = run(file, **asked)
    by_r = {point.values["model.lora.r"]: point for point in outcome.points}
    assert [by_r[r].state for r in ("1", "2")] == ["complete"] * 2
    pruned = [point for point in outcome.points if point.state == "pruned"]
    assert pruned
    for point in pruned:
        (trial,) = point.trials
        assert 0 < len(trial.reported) < 12
        assert trial.value == max(trial.reported)
    assert {e["r"] for e in events(tmp_path, "leaves")} == {point.values["model.lora.r"] for point in pruned}
    assert events(tmp_path)[0]["callbacks"] == "lora_lightning.commands.sweep.pruning_callback.ReportValidations"
    assert run(file, **asked)[1] == []  # what was pruned stays so


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_sampler_draws_as_many_as_are_asked_within_the_ranges_and_goes_on(tmp_path, sampler):
    asked = {"ranges": ["model.lora.alpha=1..64:log", "model.lora.dropout=0.0..0.2"], "sampler": sampler}
    file = plan(tmp_path, level=LEVELS)
    first, _ = run(file, **asked, trials=4)
    again, said = run(file, **asked, trials=6)
    assert len(first.points) == 4
    assert len([s for s in said if s[0] == "begins"]) == 2
    for point in again.points:
        assert point.values["model.lora.r"] in {"1", "2", "4"}
        assert 1 <= int(point.values["model.lora.alpha"]) <= 64
        assert 0 <= float(point.values["model.lora.dropout"]) <= 0.2
    assert len({tuple(point.values.values()) for point in again.points}) == 6
    with pytest.raises(LoRAError, match=r'alpha \("whole numbers, log", now "whole numbers"\)'):
        run(file, **asked | {"ranges": ["model.lora.alpha=1..64", *asked["ranges"][1:]]}, trials=6)


def worker(file, **asked):
    """A sweep in a process of its own; its process number."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        run(file, **asked)
        code = 0
    except KeyboardInterrupt:
        code = 130
    except Stopped:
        code = 143
    finally:
        os._exit(code)


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def await_that(happened):
    until = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.02)


SIGNALS = [pytest.param(*s, marks=pytest.mark.slow) for s in ((signal.SIGTERM, 143), (signal.SIGINT, 130))]


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGKILL, -9), *SIGNALS])
def test_a_sweep_that_is_killed_ends_its_fits_and_goes_on_where_it_was(tmp_path, number, ends):
    file, state = plan(tmp_path, level=LEVELS, validations=10, pause=0.15), "001_r-2/version_0/state.json"
    process, state = worker(file), tmp_path / "runs/quick-sweep" / state
    await_that(lambda: state.is_file() and state.read_text() in ("3", "4"))
    os.kill(process, number)
    assert ended(process) == ends
    outcome, said = run(file)  # waits for what the killed one has left
    assert [e["r"] for e in events(tmp_path, "leaves")] == ["2"]
    assert sorted(s[1] for s in said if s[0] == "begins") == ["2", "4"]
    first, again = (e for e in events(tmp_path, "begins") if e["r"] == "2")
    assert again["from"] >= 3
    assert first["ckpt"] == again["ckpt"] == "auto"
    assert placed(outcome) == [2, 4, 1]


def test_two_processes_on_one_study_make_each_fit_once_and_one_goes_on_for_the_other_that_is_killed(tmp_path):
    ranks = [str(r) for r in (1, 2, 4, 8, 16, 32)]
    levels = {r: int(r) / 100 for r in ranks}
    file = plan(tmp_path, level=levels, validations=8, pause=0.1)
    asked = {"grid": [f"model.lora.r={','.join(ranks)}"], "storage": "shared.log"}
    first, second = worker(file, **asked), worker(file, **asked)
    await_that(lambda: (tmp_path / "events.jsonl").is_file() and len(events(tmp_path, "begins")) >= 4)
    time.sleep(0.4)  # so that its fit has a checkpoint
    os.kill(first, signal.SIGKILL)
    assert (ended(first), ended(second)) == (-9, 0)
    outcome, said = run(file, **asked)
    assert said == []
    assert placed(outcome) == [32, 16, 8, 4, 2, 1], [(p.values, p.state) for p in outcome.points]
    whole = [event["r"] for event in events(tmp_path, "ends")]
    assert sorted(whole, key=int) == ranks, "a fit was made twice or never"
    (left,) = events(tmp_path, "leaves")
    again = [event["from"] for event in events(tmp_path, "begins") if event["r"] == left["r"]]
    assert len(again) == 2
    assert again[1] >= left["saved"], "the fit of the killed process goes on from its checkpoint"


def test_a_storage_that_cannot_serve_is_refused_without_its_password(tmp_path):
    with pytest.raises(LoRAError, match=r"journal: --storage study\.log"):  # SQLite hands one trial to two processes
        run(plan(tmp_path), storage="sqlite:///study.db")
    with pytest.raises((LoRAError, ImportError), match=r"postgresql\+psycopg://user@host/name") as e:
        run(plan(tmp_path), storage="postgresql://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(e.value)
