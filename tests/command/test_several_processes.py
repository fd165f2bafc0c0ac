"""Laws 2, 4 and 8 with several processes, through the command: what stops one stops all."""

import json
import re

import pytest
import torch

from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from tests.chats import make_llama, write_chats
from tests.command.process import REPOSITORY, logged_rows
from tests.command.warm import run_all
from tests.training.resuming import differing
from tests.training.test_samples import CONFIG

OVERLAY = REPOSITORY / "configs/strategy/ddp.yaml"
EPOCH, MIDDLE = 3, 4
"""Optimizer steps: at the end of the first of three epochs, and in the middle of the second."""


def fit(tiny, name, *args, fault="", count=2, launcher="torchrun", of=None, overlay=OVERLAY):
    """A case: three epochs of three steps, with dropout, shuffling and accumulation."""
    given = ["fit", "--config", tiny.config, "--config", overlay, "--name", of or name, "--trainer.devices", count]
    given += ["--trainer.max_epochs", 3, "--model.lora.dropout", 0.2, "--data.init_args.batch_size", 16 // count]
    given += ["--trainer.accumulate_grad_batches", 3, "--trainer.log_every_n_steps", 1]
    given += ["--trainer.callbacks", "[tests.command.faults.Fault]", *args]
    env = {"FAULT": fault}
    return {"name": name, "args": list(map(str, given)), "count": count, "launcher": launcher, "env": env}


def interrupted(tiny, name, fault, *args, **options):
    """A case that is interrupted, and the same command started again."""
    again = fit(tiny, f"{name}-again", *args, "--ckpt_path", "auto", of=name, **options)
    return [fit(tiny, name, *args, fault=fault, **options), again]


def end_of(folder, name):
    """Adapter, optimizer and the log's rows of the only version of a run."""
    assert [p.name for p in (folder / "runs" / name).glob("version_*")] == ["version_0"]
    run = folder / "runs" / name / "version_0"
    content = load_checkpoint(run / "checkpoints" / "last.ckpt")
    moments = content["optimizer_states"][0]["state"]
    flat = {f"{i}.{key}": value for i, state in moments.items() for key, value in state.items()}
    rows = logged_rows(run / "metrics.csv")
    return {**content["state_dict"], **flat, "step": content["global_step"], "rows": rows}


def everything_on(tiny):
    """All callbacks, a plateau and W&B, as srun starts it."""
    callbacks = ["lora_lightning.MeasureBefore", "demos.baselines.Baselines", "lora_lightning.ExportAtEnd"]
    plateau = {"class_path": "lightning.pytorch.cli.ReduceLROnPlateau", "init_args": {"monitor": "val/loss"}}
    given = ["--trainer.callbacks", json.dumps(callbacks), "--model.lr_scheduler", json.dumps(plateau)]
    return fit(tiny, "everything", "--config", REPOSITORY / "configs/logger/wandb.yaml", *given, launcher="srun")


def on_run(command, name, count, *args):
    """A command on a trained run, which is in the folder that all share; alone by `single.yaml`."""
    run = f"runs/{name}/version_0"
    given = [command, "--config", f"{run}/config.yaml", "--ckpt_path", run, *args]
    given += ["--config", str(REPOSITORY / "configs/strategy/single.yaml")] if count == 1 else []
    case = {"name": f"{command}-{count}", "args": given, "count": count}
    keep = {"keep": f"{run}/predict/predictions.jsonl"} if command == "predict" else {}
    return {**case, **keep, "launcher": "none" if count == 1 else "torchrun"}


def answering(folder):
    """A tiny Llama that answers after each validation."""
    torch.manual_seed(0)
    llama, chats = make_llama(folder / "llama"), write_chats(folder / "chats.jsonl", rows=40)
    config = folder / "chat.yaml"
    config.write_text(CONFIG.format(llama=llama, chats=chats, packing="false"))
    given = ["fit", "--config", str(config), "--config", str(OVERLAY), "--trainer.max_epochs", "1"]
    return {"name": "chat", "args": given}


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
        fit(tiny, "scaled", *SCALED, fault=f"nan:1:{MIDDLE}"),
        fit(tiny, "w0", fault=f"w0:1:{MIDDLE}"),
        fit(tiny, "gradient", fault="gradient:1:0"),
        fit(tiny, "disk", fault=f"disk:0:{MIDDLE}"),
        fit(tiny, "gone", fault=f"kill:1:{MIDDLE}"),
        everything_on(tiny),
        *(on_run(command, "whole", count) for command in ("test", "predict") for count in (2, 1)),
    ]
    return {**run_all(cases, folder), "folder": folder}


@pytest.fixture(scope="module")
def more(tiny, tmp_path_factory):
    """With a worker in each process; and with four of them."""
    folder = tmp_path_factory.mktemp("more")
    worker = ["--data.init_args.num_workers", "1"]
    cases = [
        fit(tiny, "whole", *worker),
        *interrupted(tiny, "ended", f"kill:0,1:{EPOCH}", *worker),
        *interrupted(tiny, "middle", f"kill:0,1:{MIDDLE}", "--save_every", "1", *worker),
        fit(tiny, "four", count=4),
        *interrupted(tiny, "four-killed", f"kill:0,1,2,3:{MIDDLE}", "--save_every", "1", count=4),
        fit(tiny, "all", fault=f"term:0,1:{MIDDLE}"),
        fit(tiny, "early", fault="term:1:-1"),
        fit(tiny, "stuck", fault=f"stuck:0:{MIDDLE}+error:1:{MIDDLE}"),
        fit(tiny, "loss", fault=f"loss:1:{MIDDLE}"),
        fit(tiny, "fewer", "--trainer.max_epochs", "4", "--ckpt_path", "runs/whole", count=1, launcher="none"),
        answering(folder),
    ]
    return {**run_all(cases, folder), "folder": folder}


@pytest.mark.slow
def test_with_workers_with_four_processes_and_with_samples(more):
    for name, whole in (("ended", "whole"), ("middle", "whole"), ("four-killed", "four")):
        assert set(more[name].codes) == {-9}, more[name]
        for done in (whole, f"{name}-again"):
            assert set(more[done].codes) == {0}, more[done]
        assert differing(end_of(more["folder"], whole), end_of(more["folder"], name)) == []
    # as in NCCL's collectives, which know of no process that is gone
    assert more["stuck"].codes == [2, 1], more["stuck"]
    assert "a fault of one's own" in more["stuck"].said[1]
    assert more["loss"].codes == [2, 2], more["loss"]
    (line,) = errors(more["loss"])
    assert "the loss of optimizer step 5 is not finite" in line
    assert more["chat"].codes == [0, 0], more["chat"]
    samples = [json.loads(line) for line in (only_folder(more["folder"], "chat") / "samples.jsonl").open()]
    assert len(samples) == 3
    assert more["chat"].everything.count("An answer") == 1


@pytest.mark.slow
def test_sigterm_to_all_saves_once_and_before_training_it_ends_all(more):
    assert more["all"].codes == [75, 0], more["all"]
    assert more["all"].everything.count("SIGTERM: ") == 1
    assert more["early"].codes == [143, 143], more["early"]


@pytest.mark.parametrize("name", ["killed", "asked"])
def test_a_run_in_two_processes_that_is_interrupted_ends_as_if_it_had_not_been(played, name):
    codes = {"killed": [-9, -9], "asked": [75, 0]}
    assert played["whole"].codes == [0, 0], played["whole"]
    assert played[name].codes == codes[name], played[name]
    assert played[f"{name}-again"].codes == [0, 0], played[f"{name}-again"]
    whole, again = end_of(played["folder"], "whole"), end_of(played["folder"], name)
    assert whole["step"] == 9
    assert differing(whole, again) == []
    if name == "asked":
        assert played["asked"].everything.count("SIGTERM: ") == 1
        assert f"after step {MIDDLE + 1}" in played["asked"].said[0]


SCALER = {"class_path": "torch.amp.GradScaler", "init_args": {"device": "cpu", "init_scale": 1024.0}}
MIXED = {"precision": "16-mixed", "device": "cpu", "scaler": SCALER}
PLUGIN = [{"class_path": "lightning.pytorch.plugins.precision.MixedPrecision", "init_args": MIXED}]
SCALED = ["--trainer.plugins", json.dumps(PLUGIN)]
"""float16 autocast with its loss scaler, which Lightning's word 16-mixed does not give a CPU."""

STOPS = {
    "nan": r"rank 1.*the loss of optimizer step 5 is not finite: .* rows .* 'bert.encoder.layer.1.output.dense'",
    "scaled": r"the loss of optimizer step 5 is not finite: .* rows .* 'bert.encoder.layer.1.output.dense'",
    "w0": "W0 moved during fit: 1 frozen tensors changed, first 'bert.embeddings.word_embeddings.weight'",
    "gradient": "2 of 28 trainable tensors got no gradient in the first backward",
    "disk": "last.ckpt' .*--runs_dir",
    "gone": "another process is gone: all processes stop; --ckpt_path last",
}


@pytest.mark.parametrize("name", STOPS)
def test_what_goes_wrong_in_one_process_stops_all_with_one_line(played, name):
    case = played[name]
    assert case.codes == ([2, -9] if name == "gone" else [2, 2]), case
    assert len(errors(case)) == 1, case
    assert re.search(STOPS[name].removeprefix("rank 1.*"), errors(case)[0]), case
    assert case.seconds < 60, case


def only_folder(folder, name):
    (run,) = (folder / "runs" / name).glob("version_*")
    return run


def test_a_run_of_two_processes_leaves_what_a_run_of_one_does(played):
    """Under srun: one folder, one config, one log, one W&B run, one table, one export, each figure in the report."""
    case, folder = played["everything"], played["folder"]
    assert case.codes == [0, 0], case
    run = only_folder(folder, "everything")
    assert {"config.yaml", "metrics.csv", "report.json", "export", "checkpoints"} <= {p.name for p in run.iterdir()}
    assert len(list((folder / "runs/wandb").glob("offline-run-*"))) == 1
    assert case.everything.count("Run runs/everything/version_0") == case.said[0].count("Run runs/everything/version_0")
    assert case.everything.count("dtypes: W0") == case.everything.count("before training:") == 1
    report = json.loads((run / "report.json").read_text())
    assert {"val_accuracy_before", "probe_accuracy", "export_max_rel_diff", "val_accuracy"} <= set(report)
    assert report["w0_unchanged"] is True
    assert report["export_max_rel_diff"] < 1e-5


def test_two_processes_test_and_predict_as_one_does(played):
    """On a run whose own config names two devices; each row once, in the order of the file."""
    for name in ("test-2", "test-1", "predict-2", "predict-1"):
        assert set(played[name].codes) == {0}, played[name]
    figures, tables = [], []
    for count in (2, 1):
        said = played[f"test-{count}"].said[0]
        figures.append(dict(re.findall(r"(test/\w+)\W+([0-9.]+)", said)))
        file = played["folder"] / f"predict-{count}.kept"
        tables.append([json.loads(line) for line in file.open()])
    assert figures[0].keys() == figures[1].keys() >= {"test/loss", "test/accuracy"}
    for name, value in figures[0].items():
        assert float(value) == pytest.approx(float(figures[1][name]), rel=1e-5)
    assert [row["row"] for row in tables[0]] == list(range(40))
    for two, one in zip(*tables, strict=True):
        assert two["prediction"] == one["prediction"]
        assert two["probabilities"] == pytest.approx(one["probabilities"], abs=1e-5)


@pytest.mark.slow
def test_another_number_of_processes_goes_on_and_says_so(more):
    case = more["fewer"]
    assert case.codes == [0], case
    assert "written by 2 processes and is read by 1: the fit goes on, and not bit for bit" in case.said[0]
    assert end_of(more["folder"], "fewer")["step"] > 9
