"""Law 9 for texts: two processes equal one with twice the batch, packed, one by one and streamed."""

import subprocess
import sys

import pytest
import torch

from tests.command.process import REPOSITORY
from tests.training.texts_in_two import BATCH, STEPS, WAYS, fit, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write(folder)
    # In a process of its own: the first backward must not come before the fork.
    command = [sys.executable, "-m", "tests.training.texts_in_two", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_equal_one_with_twice_the_batch(folder, way):
    ours, whole = torch.load(folder / f"{way}.pt"), fit(folder, way, 2 * BATCH)
    assert ours["steps"] == whole["steps"] == STEPS
    assert ours["losses"] == pytest.approx(whole["losses"], rel=1e-10)
    for name, tensor in whole["adapter"].items():
        assert float((ours["adapter"][name] - tensor).norm()) <= 1e-9 * float(tensor.norm()), name
    figures = ("val/loss", "val/perplexity", "val/token_accuracy")
    assert {n: ours["metrics"][n] for n in figures} == pytest.approx(
        {n: whole["metrics"][n] for n in figures}, rel=1e-6
    )
