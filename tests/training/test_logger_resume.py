"""Every logger goes on with the run that a fit resumes, without being told which that was."""

import csv
import shutil
from importlib.util import find_spec

import pytest
import torch

from lora_lightning import WandbLogger
from lora_lightning.cli.main import resume_loggers
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from lora_lightning.training.tracking.loggers import ContinuedCSVLogger, go_on_with, runs_of
from tests.command.warm import run_all
from tests.training import resuming
from tests.wandb_file import runs_in

TERM_AT, KILL_AT, STEPS = 5, 11, 16
"""Optimizer steps. `last.ckpt` is written every fourth, an epoch's end (8) and where SIGTERM came."""


@pytest.fixture(scope="module")
def logged(tiny, tmp_path_factory):
    """A fit that was sent SIGTERM, went on, was killed and went on."""
    folder = tmp_path_factory.mktemp("logged")
    args = ["fit", "--config", tiny.config, "--ckpt_path", "auto", "--save_every", 4, "--trainer.max_epochs", 2]
    args += ["--trainer.log_every_n_steps", 1, "--trainer.callbacks+=tests.command.faults.Fault"]
    args += ["--trainer.logger+=lora_lightning.WandbLogger", "--trainer.logger.save_dir", "runs"]
    if find_spec("tensorboard"):
        args += ["--trainer.logger+=TensorBoardLogger", "--trainer.logger.save_dir", "boards"]
    one = {"args": args, "count": 1, "launcher": "none"}
    faults = {"asked": f"term:0:{TERM_AT}", "killed": f"kill:0:{KILL_AT}", "ended": ""}
    cases = [{"name": name, "env": {"FAULT": fault}, **one} for name, fault in faults.items()]
    # What all are forked from must not have imported W&B: the first to end would take its scratch folder along.
    warm = {**one, "name": "warm", "args": ["fit", "--config", tiny.config, "--print_config"]}
    played = run_all([warm, *cases], folder)
    assert [played[name].codes for name in faults] == [[75], [-9], [0]], played
    return folder


@pytest.mark.slow
def test_wandb_offline_goes_on_with_the_same_run_after_sigterm_and_after_sigkill(logged):
    term, kill, last = runs_in(logged / "runs")
    names = {file.stem for file in (logged / "runs" / "wandb").glob("offline-run-*/run-*.wandb")}
    assert names == {f"run-{last.id}"}, "three folders of one run"
    assert term.id == last.id
    assert (term.config["w0"], term.config["lora"]) == (last.config["w0"], last.config["lora"])
    # SIGTERM: nothing is missing and nothing is there twice.
    assert sorted(term.points("train/loss_step")) == list(range(TERM_AT + 1))
    assert last.exit_code == 0
    # SIGKILL: W&B loses what it held in memory; the fit goes on from the newest checkpoint before.
    assert kill.points("train/loss_step").keys() <= set(range(TERM_AT + 1, KILL_AT))
    assert sorted(last.points("train/loss_step")) == list(range(KILL_AT // 4 * 4, STEPS))


@pytest.mark.slow
def test_csv_and_tensorboard_have_each_step_once_and_the_numbers_that_wandb_has(logged):
    (file,) = (logged / "runs" / "tiny").glob("version_*/metrics.csv")
    with file.open() as text:
        losses = {int(row["step"]): row["train/loss_step"] for row in csv.DictReader(text) if row["train/loss_step"]}
    assert sorted(losses) == list(range(STEPS))
    for run in runs_in(logged / "runs"):
        for step, loss in run.points("train/loss_step").items():
            assert loss == pytest.approx(float(losses[step]), rel=1e-6)
    if not find_spec("tensorboard"):
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (logged / "boards").rglob("version_*")
    assert len(list(folder.glob("events.*"))) == 3
    events = EventAccumulator(str(folder)).Reload().Scalars("train/loss_step")
    assert [event.step for event in events] == list(range(STEPS)), "what came after the checkpoint is hidden"


def test_csv_forgets_what_an_interrupted_fit_wrote_after_its_checkpoint_and_a_torn_row(tmp_path):
    file = tmp_path / "run" / "version_0" / "metrics.csv"
    file.parent.mkdir(parents=True)
    file.write_text("loss,step\n1.0,0\n2.0,1\n3.0,2\n4.0,3\n0.5")
    logger = ContinuedCSVLogger(tmp_path, name="run", version=0)
    logger.go_on_from(2)
    logger.log_metrics({"loss": 7.0}, step=2)
    logger.finalize("success")
    rows = [(row["step"], row["loss"]) for row in resuming.logged(tmp_path)]
    assert rows == [("0", "1.0"), ("1", "2.0"), ("2", "7.0")]


def wandb_logger(folder, **options):
    return WandbLogger(offline=True, save_dir=str(folder), **options)


def test_loggers_of_one_kind_go_on_in_their_order_and_an_id_in_the_config_wins(tmp_path):
    loggers = [wandb_logger(tmp_path, version="first"), wandb_logger(tmp_path, version="second")]
    assert runs_of(loggers) == [["WandbLogger", "first"], ["WandbLogger", "second"]]
    assert runs_of([wandb_logger(tmp_path)]) == [], "no run has begun"
    anew = [wandb_logger(tmp_path), wandb_logger(tmp_path, version="mine"), wandb_logger(tmp_path)]
    go_on_with([object(), *anew], runs_of(loggers), 3)
    assert [logger.version for logger in anew] == ["first", "mine", None]


def test_only_the_newest_state_of_a_run_is_that_run_going_on(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "version_0")
    for name, found in (("best", None), ("last", "abc")):
        file = tmp_path / "version_0" / "checkpoints" / f"{name}.ckpt"
        content = load_checkpoint(file)
        content["lora_lightning_resume"]["loggers"] = [["WandbLogger", "abc"]]
        torch.save(content, file)
        resume_loggers([logger := wandb_logger(tmp_path)], str(file))
        assert logger.version == found
