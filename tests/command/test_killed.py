"""Law 8 on a real process: killed at random moments and started again, it ends with the bytes of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from tests.command.process import REPOSITORY
from tests.command.test_several_processes import end_of
from tests.training.resuming import differing


def start(tiny, folder, *args, epochs=4):
    """`lora-lightning fit` on a tiny BERT, with dropout, that saves after every third step."""
    given = ["fit", "--config", tiny.config, "--trainer.max_epochs", str(epochs), "--model.lora.dropout", "0.2"]
    given += ["--data.init_args.batch_size", "8", "--save_every", "3", "--trainer.log_every_n_steps", "1", *args]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "lora_lightning", *given]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process):
    said = process.communicate(timeout=300)[0].decode()
    return process.returncode, said


@pytest.mark.slow
def test_twenty_kills_end_with_the_bytes_of_the_uninterrupted_run(tiny, tmp_path):
    """At random moments: every other time from the start on, else once there is a newer checkpoint."""
    kills, epochs, rng, steps = 20, 60, random.Random(20), []
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    code, said = finish(start(tiny, whole, epochs=epochs))
    assert code == 0, said
    file = killed / "runs/tiny/version_0/checkpoints/last.ckpt"
    for number in range(kills):
        before = file.stat().st_mtime_ns if file.is_file() else None
        process = start(tiny, killed, "--ckpt_path", "auto", epochs=epochs)
        limit = time.monotonic() + 120
        while number % 2 and process.poll() is None and time.monotonic() < limit:
            if file.is_file() and file.stat().st_mtime_ns != before:
                break
            time.sleep(0.005)
        time.sleep(rng.random() * (0.3 if number % 2 else 6))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        steps.append(load_checkpoint(file)["global_step"] if file.is_file() else 0)
    code, said = finish(start(tiny, killed, "--ckpt_path", "auto", epochs=epochs))
    assert code == 0, said
    end = end_of(whole, "tiny")
    print(f"newest step after each kill: {steps}, of {end['step']}")
    assert steps == sorted(steps), "a kill lost what was saved"
    assert len(set(steps) - {0, end["step"]}) >= kills // 3, f"too few kills fell into training: {steps}"
    assert differing(end, end_of(killed, "tiny")) == []


@pytest.mark.slow
def test_ctrl_c_in_a_fit(tiny, tmp_path):
    running, limit = start(tiny, tmp_path, epochs=10_000), time.monotonic() + 120
    while time.monotonic() < limit and not list(tmp_path.glob("runs/tiny/version_0/checkpoints/*.ckpt")):
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    code, said = finish(running)
    assert code == 130, said
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "lora-lightning: error: stopped by Ctrl-C"
