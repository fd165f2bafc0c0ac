"""Real launchers: the processes that the command starts by itself, and those of torchrun, on one and on two "nodes"."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command.process import REPOSITORY
from tests.command.test_several_processes import MIDDLE, end_of, fit, only_folder
from tests.command.warm import free_port
from tests.training.resuming import differing

TORCHRUN = Path(sys.executable).with_name("torchrun")
ENDS = (2, -signal.SIGKILL)
"""By itself, or by Lightning's observer, which looks every five seconds."""


def start(case, folder, *launcher):
    """A case of the other tests, started by what a person would start."""
    env = {**os.environ, **case["env"], "PYTHONPATH": str(REPOSITORY)}
    command = [*(launcher or (sys.executable,)), "-m", "lora_lightning", *case["args"]]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process):
    """Exit code, and what all its processes have said, once none of them holds the pipe any more."""
    said = process.communicate(timeout=300)[0]
    return process.returncode, said


def one_error(said):
    (line,) = [line for line in said.splitlines() if "error:" in line]
    return line


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_command_that_started_it(tiny, tmp_path):
    code, said = finished(start(fit(tiny, "gone", fault=f"kill:1:{MIDDLE}"), tmp_path))
    assert code in ENDS, said
    assert "another process is gone" in one_error(said)


@pytest.mark.slow
def test_an_error_in_a_process_that_was_started_ends_the_command(tiny, tmp_path):
    code, said = finished(start(fit(tiny, "wrong", fault=f"stuck:0:{MIDDLE}+error:1:{MIDDLE}"), tmp_path))
    assert code in ENDS, said
    assert said.count("ZeroDivisionError: a fault of one's own") == 1


@pytest.mark.slow
def test_processes_that_lose_the_one_that_started_them_end(tiny, tmp_path):
    began = time.monotonic()
    code, said = finished(start(fit(tiny, "first", fault=f"kill:0:{MIDDLE}"), tmp_path))
    assert code == -signal.SIGKILL
    assert "process is gone" in one_error(said)
    assert time.monotonic() - began < 200


@pytest.mark.slow
def test_sigterm_to_the_command_saves_once_for_all_and_the_resumed_fit_is_the_uninterrupted_one(tiny, tmp_path):
    """With workers; the signal comes at a step, to the first process and to no other."""
    workers = ["--data.init_args.num_workers", 1]
    code, said = finished(start(fit(tiny, "whole", *workers), tmp_path))
    assert code == 0, said
    code, said = finished(start(fit(tiny, "asked", *workers, fault=f"term:0:{MIDDLE}"), tmp_path))
    assert code == 75, said
    assert said.count("goes on from there") == 1
    code, said = finished(start(fit(tiny, "asked", *workers, "--ckpt_path", "last"), tmp_path))
    assert code == 0, said
    assert differing(end_of(tmp_path, "whole"), end_of(tmp_path, "asked")) == []


@pytest.mark.slow
def test_torchrun_on_one_machine_and_on_two(tiny, tmp_path):
    """And both end with the same adapter."""
    rendezvous = ["--master_addr", "127.0.0.1", "--master_port"]
    one = start(fit(tiny, "one"), tmp_path, TORCHRUN, "--nproc_per_node", "2", *rendezvous, str(free_port()))
    code, said = finished(one)
    assert code == 0, said
    assert said.count("Run runs/one/version_0") == 1
    case, port = fit(tiny, "two", "--trainer.devices", 1, "--trainer.num_nodes", 2), str(free_port())
    nodes = [
        start(
            case,
            tmp_path,
            TORCHRUN,
            "--nnodes",
            "2",
            "--node_rank",
            str(rank),
            "--nproc_per_node",
            "1",
            *rendezvous,
            port,
        )
        for rank in (0, 1)
    ]
    ends = [finished(node) for node in nodes]
    assert [code for code, _ in ends] == [0, 0], ends
    assert [said.count("Run runs/two/version_0") for _, said in ends] == [1, 0]
    for name in ("one", "two"):
        assert (only_folder(tmp_path, name) / "config.yaml").is_file()
    assert differing(end_of(tmp_path, "one"), end_of(tmp_path, "two")) == []
