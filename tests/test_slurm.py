"""The script for SLURM is bash, starts the command that it should, and asks for another turn on 75 and on no other."""

import os
import subprocess

import pytest

from tests.command.process import REPOSITORY

SCRIPT = REPOSITORY / "configs/slurm/fit.sh"


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True), (137, False)])
def test_only_a_fit_that_was_pre_empted_is_queued_again(tmp_path, code, requeued):
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    for name, end in (("srun", code), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/said\nexit {end}\n')
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_ID": "7"}
    env = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(SCRIPT), "--config", "x.yaml", "--name", "a b"], env=env, timeout=60, check=False
    )
    assert done.returncode == code
    first, *others = (tmp_path / "said").read_text().splitlines()
    assert first == (
        "srun --wait=60 lora-lightning fit --config x.yaml --name a b --config configs/strategy/multi-node.yaml"
        " --trainer.num_nodes 2 --trainer.devices 8 --ckpt_path auto"
    )
    assert others == (["scontrol requeue 7"] if requeued else [])
