"""One run folder, one fit: a second process is refused, by the number of the first, and takes nothing away from it."""

import multiprocessing
import os
import time

import pytest
import torch

from lora_lightning import LoRAError
from lora_lightning.training.checkpoints.file_io import write_checkpoint
from lora_lightning.training.checkpoints.run_folder import LOCK, lock_run
from tests.training import resuming

FORK = multiprocessing.get_context("fork")


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
    assert not (tmp_path / "run/version_0/checkpoints").exists()
    assert not (tmp_path / "run/version_0/metrics.csv").exists()


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


def test_a_living_processs_part_file_is_left_and_a_dead_ones_is_taken_away(tmp_path):
    process = FORK.Process(target=time.sleep, args=(600,), daemon=True)
    process.start()
    living = tmp_path / f".last.ckpt.{process.pid}.part"
    living.write_bytes(b"half")
    write_checkpoint({"state_dict": {"a": torch.ones(1)}}, tmp_path / "last.ckpt")
    assert living.exists()
    process.kill()
    process.join()
    write_checkpoint({"state_dict": {"a": torch.ones(1)}}, tmp_path / "last.ckpt")
    assert not living.exists()
