"""Tensor parallelism: laws 1, 2, 7, 8 and 9 where layers are split within themselves."""

import subprocess
import sys

import pytest
import torch

from tests.processes import REPOSITORY
from tests.training import split


def script(name, folder, processes, timeout=300):
    command = [sys.executable, "-m", "tests.training.split", name, str(folder), str(processes)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


# Pieces alone.


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    script("alone", folder, 2)
    return torch.load(folder / "pieces.pt")


@pytest.mark.parametrize("case", split.CASES)
def test_a_split_model_is_the_model_in_outputs_gradients_and_fingerprint(pieces, case):
    for found in pieces:
        assert found[case]["far"] < 1e-12, found[case]
        assert found[case]["fingerprint"]
        assert found[case]["moved"]


def test_a_fresh_adapter_changes_nothing_bit_for_bit(pieces):
    for found in pieces:
        assert found["fresh"] == dict.fromkeys(found["fresh"], True)


@pytest.mark.slow
def test_four_processes_in_two_groups_are_the_model(tmp_path):
    script("alone_in_groups", tmp_path, 4)
    for found in torch.load(tmp_path / "pieces.pt"):
        for case in split.CASES:
            assert found[case]["far"] < 1e-12 or case == "dropout", (case, found[case])
            assert (found[case]["fingerprint"], found[case]["moved"]) == (True, True)


# Law 9.


def assert_equal_to_one(folder):
    for name, fit in split.fits(4).items():
        one, ours = fit(), torch.load(folder / f"{name}.pt")
        tolerance = 1e-6 if "float32" in name else 1e-9
        assert ours["steps"] == one["steps"] >= 20
        for key, value in one["adapter"].items():
            assert split.far(value, ours["adapter"][key]) < tolerance, (name, key)
        assert ours["losses"] == pytest.approx(one["losses"], rel=tolerance)
        assert ours["metrics"] == pytest.approx(one["metrics"], rel=1e-6)


def test_two_processes_equal_one(tmp_path):
    script("equality", tmp_path, 2)
    assert_equal_to_one(tmp_path)
    assert all(torch.load(tmp_path / "alike.pt"))


@pytest.mark.slow
def test_two_groups_of_two_processes_equal_one(tmp_path):
    script("equality", tmp_path, 4)
    assert_equal_to_one(tmp_path)
    assert all(torch.load(tmp_path / "alike.pt"))
