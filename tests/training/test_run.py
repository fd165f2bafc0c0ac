"""A run's folder: its checkpoint is found from what a person would write, and one process at a time trains in it."""

import multiprocessing
import os
import time

import pytest
import torch

from lora_lightning import LoRAError
from lora_lightning.training.checkpoints.run_folder import (
    LOCK,
    continued_version,
    find_checkpoint,
    load_checkpoint,
    lock_run,
    run_of_checkpoint,
)
from lora_lightning.training.trainer import logging_interval
from tests.training import resuming

FORK = multiprocessing.get_context("fork")


def make_run(version, name="last.ckpt", content=None):
    """The folder of a run's checkpoints, with one in it."""
    folder = version / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content or {"state_dict": {}}, folder / name)
    return folder


def test_a_run_is_found_by_file_by_version_and_by_name(trained):
    best = trained / "checkpoints" / "best.ckpt"
    for path in (best, trained, trained.parent):
        assert find_checkpoint(path) == best
        assert run_of_checkpoint(find_checkpoint(path)) == trained
    assert find_checkpoint(trained, "last").name == "last.ckpt"
    with pytest.raises(LoRAError, match=r"'.*tiny'"):
        find_checkpoint(trained.parent.parent / "tinny")


def test_the_newest_version_with_checkpoints_counts(tmp_path):
    with pytest.raises(LoRAError, match="run `lora-lightning fit` first"):
        find_checkpoint(tmp_path)
    for version in ("version_2", "version_10"):
        make_run(tmp_path / version)
    (tmp_path / "version_11").mkdir()
    assert find_checkpoint(tmp_path).parent.parent.name == "version_10"


def test_a_folder_of_runs_lists_them(tmp_path):
    for number in range(20):
        os.utime(make_run(tmp_path / "runs" / f"run{number}" / "version_0"), (number, number))
    with pytest.raises(LoRAError, match=r"holds 20 runs, the newest first '\S*run19', '\S*run18'.* and 12 more"):
        find_checkpoint(tmp_path / "runs")


def test_best_is_asked_of_model_checkpoint_where_no_file_has_that_name(trained, tmp_path):
    content = load_checkpoint(trained / "checkpoints" / "best.ckpt")
    content["callbacks"] = {"ModelCheckpoint{}": {"best_model_path": "/elsewhere/epoch=1.ckpt"}}
    for number in (1, 2, 3):
        folder = make_run(tmp_path / "version_0", f"epoch={number}.ckpt", content)
        os.utime(folder / f"epoch={number}.ckpt", (number, number))
    assert find_checkpoint(tmp_path).name == "epoch=1.ckpt"
    assert find_checkpoint(tmp_path, "last").name == "epoch=3.ckpt"


def test_a_fit_goes_on_in_its_own_folder_from_its_newest_state_only(trained):
    runs = trained.parent
    assert continued_version(find_checkpoint(trained, "last"), runs) == 0
    assert continued_version(find_checkpoint(trained, "best"), runs) is None
    assert continued_version(find_checkpoint(trained, "last"), runs.parent / "other") is None


def test_a_small_fit_logs_at_least_fifty_rows_and_a_long_one_every_fiftieth_step(tiny, tmp_path):
    assert [logging_interval(n) for n in (1, 36, 100, 1000, 2500, 10**6, float("inf"))] == [1, 1, 2, 20, 50, 50, 50]
    for given, wanted in ((None, 1), (3, 3)):
        options = {"max_steps": 2, "log_every_n_steps": given}
        assert resuming.fit(tiny, tmp_path / str(given), **options).log_every_n_steps == wanted


def hold(folder, ready):
    with lock_run(folder):
        ready.set()
        time.sleep(600)


@pytest.fixture
def holder(tmp_path):
    """A process that trains in `run/version_0`."""
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path / "run" / "version_0", ready), daemon=True)
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_second_fit_in_a_run_folder_is_refused_with_the_living_process(tiny, tmp_path, holder):
    with pytest.raises(LoRAError, match=rf"process {holder.pid} on \S+ trains in '.*version_0': wait"):
        resuming.fit(tiny, tmp_path, max_steps=1)
    assert [file.name for file in (tmp_path / "run/version_0").iterdir()] == [LOCK]


def test_a_process_that_was_killed_holds_nothing(tiny, tmp_path, holder):
    holder.kill()
    holder.join()
    assert (tmp_path / "run/version_0" / LOCK).is_file()  # it could not tidy up
    assert resuming.fit(tiny, tmp_path, max_steps=1).global_step == 1
    assert not (tmp_path / "run/version_0" / LOCK).exists()


def test_a_process_may_fit_twice_and_within_a_fit(tmp_path):
    for _ in range(2):
        with lock_run(tmp_path), lock_run(tmp_path):
            assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
