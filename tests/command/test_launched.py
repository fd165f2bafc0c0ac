"""Real launchers, and strategies that start or shard: what stops one stops all, and a fit goes on to the same bytes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_lightning.training.checkpoints.file_io import check_whole
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from tests.command.process import REPOSITORY
from tests.command.test_several_processes import MIDDLE, end_of, errors, fit, interrupted, only_folder
from tests.command.warm import run_all
from tests.processes import free_port
from tests.training.resuming import differing

pytestmark = pytest.mark.slow
TORCHRUN = Path(sys.executable).with_name("torchrun")


def finished(case, folder, *launcher, wait=True):
    """Exit code, and what all its processes have said, of a case started by what a person would start."""
    env = {**os.environ, **case["env"], "PYTHONPATH": str(REPOSITORY)}
    command = [*(launcher or (sys.executable,)), "-m", "lora_lightning", *case["args"]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=env, **pipes)
    ends = lambda: (process.communicate(timeout=300)[0], process.returncode)[::-1]  # noqa: E731
    return ends() if wait else ends


KILLED = (2, -signal.SIGKILL)
"""By itself, or by Lightning's observer, which looks every five seconds."""
ENDS = {
    "gone": (f"kill:1:{MIDDLE}", KILLED, "another process is gone"),
    "first": (f"kill:0:{MIDDLE}", KILLED[1:], "process is gone"),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_one_process_ends_the_command_and_all_of_its_processes(name, tiny, tmp_path):
    fault, expected, text = ENDS[name]
    began = time.monotonic()
    code, said = finished(fit(tiny, name, fault=fault), tmp_path)
    assert code in expected, said
    assert said.count(text if code == 2 or name == "first" else "terminated with code -9") == 1
    assert time.monotonic() - began < 200


def test_torchrun_on_one_machine_and_on_two(tiny, tmp_path):
    """And both end with the same adapter."""
    address, port = ["--master_addr", "127.0.0.1", "--master_port"], str(free_port())
    given = [TORCHRUN, "--nproc_per_node", "2", *address, str(free_port())]
    code, said = finished(fit(tiny, "one"), tmp_path, *given)
    assert code == 0, said
    case = fit(tiny, "two", "--trainer.devices", 1, "--trainer.num_nodes", 2)
    one_each = [TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", *address, port, "--node_rank"]
    ends = [end() for end in [finished(case, tmp_path, *one_each, str(rank), wait=False) for rank in (0, 1)]]
    assert [code for code, _ in ends] == [0, 0], ends
    assert [said.count("Run runs/two/version_0") for _, said in ends] == [1, 0]
    for name in ("one", "two"):
        assert (only_folder(tmp_path, name) / "config.yaml").is_file()
    assert differing(end_of(tmp_path, "one"), end_of(tmp_path, "two")) == []


TWO = ["--trainer.devices", 2, "--data.init_args.batch_size", 8]
SPAWN = [*TWO, "--trainer.strategy", "ddp_spawn"]
ALONE = {"count": 1, "launcher": "none"}
FORK = {**ALONE, "overlay": REPOSITORY / "configs/strategy/ddp-fork.yaml"}
WAYS = {
    "fork": (TWO, FORK, f"asked:1:{MIDDLE}", [75], {"gone": f"kill:1:{MIDDLE}"}),
    "spawn": (SPAWN, ALONE, f"asked:0:{MIDDLE}", [75], {}),
    "fsdp2": ([], {"overlay": REPOSITORY / "configs/strategy/fsdp2.yaml"}, f"term:1:{MIDDLE}", [75, 0], {}),
}
"""Arguments, how it is started, a SIGTERM to the parent of processes or to one of two, the exit codes, other faults."""


@pytest.fixture(scope="module", params=WAYS)
def played(request, tiny, tmp_path_factory):
    folder, (given, options, fault, _, faults) = tmp_path_factory.mktemp(request.param), WAYS[request.param]
    first, again = interrupted(tiny, "asked", fault, *given, **options)
    first["keep"] = "runs/asked/version_0/checkpoints"
    cases = [fit(tiny, "whole", *given, **options), first, again]
    cases += [fit(tiny, name, *given, fault=wrong, **options) for name, wrong in faults.items()]
    for case in cases:
        case["limit"] = 240.0  # a spawned process imports all by itself
    return {**run_all(cases, folder, timeout=1500), "folder": folder, "way": WAYS[request.param]}


def test_sigterm_leaves_one_whole_checkpoint_and_the_fit_goes_on_to_the_bytes_of_one_that_was_not_interrupted(played):
    asked, kept = played["asked"], played["folder"] / "asked.kept"
    assert asked.codes == played["way"][3], asked
    assert asked.everything.count("SIGTERM: ") == 1, asked
    check_whole(kept / "last.ckpt")
    assert load_checkpoint(kept / "last.ckpt")["global_step"] == MIDDLE + 1
    assert {path.name for path in kept.iterdir()} == {"best.ckpt", "last.ckpt", "last.ckpt.previous"}
    for name in ("whole", "asked-again"):
        assert set(played[name].codes) == {0}, played[name]
    whole, again = end_of(played["folder"], "whole"), end_of(played["folder"], "asked")
    assert whole["step"] == 9
    assert differing(whole, again) == []


def test_what_stops_a_process_that_the_command_started_is_told_in_one_line(played):
    for name in played["way"][4]:
        assert played[name].codes == [2], played[name]
        (line,) = errors(played[name])
        assert "process 1 was ended by SIGKILL" in line
        assert "Traceback" not in played[name].everything, played[name]


def test_sigterm_to_a_command_before_its_training_ends_all(tiny, tmp_path):
    early = run_all([fit(tiny, "early", *TWO, fault="asked:0:-1", **FORK)], tmp_path)["early"]
    assert early.codes == [143], early
    assert "Traceback" not in early.everything
