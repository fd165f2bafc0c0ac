"""Every logger goes on with the run that a fit resumes, without being told which that was."""

import csv
import os
import shutil
import subprocess
import sys

import pytest
import torch

from lora_lightning import WandbLogger
from lora_lightning.cli.main import resume_loggers
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from lora_lightning.training.tracking.csv_logger import ContinuedCSVLogger
from lora_lightning.training.tracking.wandb_logger import go_on_with, runs_of
from tests.command.process import REPOSITORY
from tests.training import resuming
from tests.training.logged import KILL_AT, STEPS, TERM_AT
from tests.wandb_file import runs_in


@pytest.fixture(scope="module")
def logged(tiny, tmp_path_factory):
    """A fit that was sent SIGTERM, went on, was killed and went on."""
    folder = tmp_path_factory.mktemp("logged")
    command = [sys.executable, "-m", "tests.training.logged", tiny.config]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert "ended with [75, -9, 0]" in done.stdout, done.stdout + done.stderr
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
def test_csv_is_one_file_with_each_step_once_and_with_the_numbers_that_wandb_has(logged):
    (file,) = (logged / "runs" / "tiny").glob("version_*/metrics.csv")
    with file.open() as text:
        losses = {int(row["step"]): row["train/loss_step"] for row in csv.DictReader(text) if row["train/loss_step"]}
    assert sorted(losses) == list(range(STEPS))
    for run in runs_in(logged / "runs"):
        for step, loss in run.points("train/loss_step").items():
            assert loss == pytest.approx(float(losses[step]), rel=1e-6)


def test_csv_forgets_what_an_interrupted_fit_wrote_after_its_checkpoint_and_keeps_a_torn_file_going(tmp_path):
    def log(logger, numbers, steps):
        for step, number in zip(steps, numbers, strict=True):
            logger.log_metrics({"loss": number}, step=step)
        logger.save()
        return logger

    log(ContinuedCSVLogger(tmp_path, name="run", version=0), [1.0, 2.0, 3.0, 4.0], range(4))
    file = tmp_path / "run" / "version_0" / "metrics.csv"
    file.write_text(file.read_text() + "0.5")  # killed in the middle of a row
    resumed = ContinuedCSVLogger(tmp_path, name="run", version=0)
    resumed.go_on_from(2)
    log(resumed, [7.0], [2]).finalize("success")
    rows = [(row["step"], row["loss"]) for row in resuming.logged(tmp_path)]
    assert rows == [("0", "1.0"), ("1", "2.0"), ("2", "7.0")]


@pytest.mark.slow
def test_tensorboard_is_one_folder_and_hides_what_came_after_the_checkpoint(logged):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (logged / "boards").rglob("version_*")
    assert len(list(folder.glob("events.*"))) == 3
    events = EventAccumulator(str(folder)).Reload().Scalars("train/loss_step")
    assert [event.step for event in events] == list(range(STEPS))


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
