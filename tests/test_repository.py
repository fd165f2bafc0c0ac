"""The files around the package tell the truth about it."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_targets_that_exist_on_the_pythons_that_are_promised(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow[True]  # YAML 1.1 reads the key `on` so
    targets = set(re.findall(r"^([a-z.][\w./-]*):", MAKEFILE, flags=re.MULTILINE))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    called = {name for step in steps for name in re.findall(r"\bmake ([\w./-]+)", step.get("run", ""))}
    assert called <= targets
    if job := workflow["jobs"].get("test"):  # the nightly one runs on the oldest alone
        promised = [line.rpartition(" :: ")[2] for line in PROJECT["classifiers"] if " :: 3." in line]
        assert job["strategy"]["matrix"]["python"] == promised
        assert PROJECT["requires-python"] == f">={promised[0]}"
        assert f"Python {promised[0]} to {promised[-1]}" in MAKEFILE


def test_the_citation_is_of_this_version_and_licence_and_each_dependency_has_a_lower_bound_and_no_pin():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    found = [citation[name] for name in ("title", "version", "license")]
    assert found == [PROJECT[name] for name in ("name", "version", "license")]
    listed = [*PROJECT["dependencies"], *(d for extra in PROJECT["optional-dependencies"].values() for d in extra)]
    unbounded = [d for d in listed if "==" in d or not (">=" in d or d.startswith(("lora_lightning[", "types-")))]
    assert unbounded == []


# ---- the script for SLURM is bash, starts what it should, and asks for another turn on 75 and on no other


SCRIPT = ROOT / "configs/slurm/fit.sh"


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True), (137, False)])
def test_only_a_fit_that_was_pre_empted_is_queued_again(tmp_path, code, requeued):
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    for name, end in (("srun", code), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/said\nexit {end}\n')
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_ID": "7"}
    env = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT), "--config", "x.yaml", "--name", "a b"]
    done = subprocess.run(command, env=env, timeout=60, check=False)
    assert done.returncode == code
    first, *others = (tmp_path / "said").read_text().splitlines()
    assert first == (
        "srun --wait=60 lora-lightning fit --config x.yaml --name a b --config configs/strategy/multi-node.yaml"
        " --trainer.num_nodes 2 --trainer.devices 8 --ckpt_path auto"
    )
    assert others == (["scontrol requeue 7"] if requeued else [])
