"""Law 9 for contrastive tasks: N processes equal one with N times the batch, however its pairs lie in them."""

import subprocess
import sys

import pytest
import torch

from tests.command.process import REPOSITORY
from tests.training import paired


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paired")
    command = [sys.executable, "-m", "tests.training.paired", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return {name: torch.load(folder / f"{name}.pt") for name in ("gathered", "alone")}


@pytest.fixture(scope="module")
def whole():
    return paired.fit()


def apart(ours, theirs):
    """Largest difference of two adapters, relative to each tensor's largest entry."""
    return max(float((ours["adapter"][k] - v).abs().max() / v.abs().max()) for k, v in theirs["adapter"].items())


def test_two_processes_with_2_and_3_pairs_equal_one_with_5(two_processes, whole):
    ours = two_processes["gathered"]
    assert ours["steps"] == whole["steps"] == 2 * paired.STEPS
    assert apart(ours, whole) < 1e-12
    assert ours["losses"] == pytest.approx(whole["losses"], rel=1e-12)


def test_evaluation_over_two_processes_is_that_of_one(two_processes, whole):
    metrics = two_processes["gathered"]["metrics"]
    assert metrics == pytest.approx(whole["metrics"], rel=1e-6)
    assert {"train/loss", "val/loss", "val/mrr", "val/recall@1", "val/recall@5"} <= set(metrics)


def test_without_gathering_it_is_another_loss(two_processes, whole):
    assert apart(two_processes["alone"], whole) > 1e-3
