"""A checkpoint that one strategy wrote goes on under every other, and in one process, to the same end."""

import subprocess
import sys

import pytest

from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from tests.processes import REPOSITORY
from tests.training import across, sharded
from tests.training.across import END, EPOCH, ONE, STRATEGIES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of all fits: an epoch under one strategy, and the next under another."""
    folder = tmp_path_factory.mktemp("across")
    across.begun(folder, ONE)
    command = [sys.executable, "-m", "tests.training.across", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for source in (ONE, *STRATEGIES):
        across.ended(folder, source, ONE)
    return folder


def adapter(folder, name):
    content = load_checkpoint(sharded.at(folder / name, END))
    assert content["global_step"] == END
    return content["state_dict"]


@pytest.mark.parametrize("target", [ONE, *STRATEGIES])
@pytest.mark.parametrize("source", [ONE, *STRATEGIES])
def test_a_checkpoint_of_one_strategy_goes_on_under_the_other_to_the_same_adapter(folder, source, target):
    whole, ours = adapter(folder, f"{ONE} to {ONE}"), adapter(folder, f"{source} to {target}")
    assert not sharded.at(folder / f"{source} to {target}", EPOCH).exists()  # the first epoch was not fitted again
    assert ours.keys() == whole.keys()
    for key, value in whole.items():
        assert float((ours[key] - value).abs().max() / value.abs().max()) < 1e-5, key
