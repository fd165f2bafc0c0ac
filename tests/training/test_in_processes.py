"""Law 9 from Python: two spawned processes, and four forked ones that accumulate, do all that one does."""

import json
import subprocess
import sys

import pytest

from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from tests.command.process import REPOSITORY
from tests.tiny import make_bert, make_reviews
from tests.training.in_processes import STEPS

WAYS = ("ddp_spawn", "ddp_fork")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    make_bert(folder / "bert")
    make_reviews(folder / "reviews.csv")
    # In a process of its own: the first backward must not come before the fork.
    command = [sys.executable, "-m", "tests.training.in_processes", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def predictions(folder, name):
    lines = (folder / name / "version_0" / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_fit_that_was_resumed_is_that_of_one_process(folder, way):
    one, several = (load_checkpoint(folder / n / "version_0" / "checkpoints" / "last.ckpt") for n in ("alone", way))
    assert one["global_step"] == several["global_step"] == STEPS
    for key, value in one["state_dict"].items():
        assert float((several["state_dict"][key] - value).norm()) <= 1e-6 * float(value.norm()), key


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_validation_test_and_predictions_are_those_of_one_process(folder, way):
    """On 42 rows, of which not every process has as many."""
    one, several = (json.loads((folder / f"{n}.json").read_text()) for n in ("alone", way))
    assert one.keys() == several.keys() >= {"val/loss", "val/accuracy", "test/loss", "test/accuracy", "export"}
    assert several == pytest.approx(one, rel=1e-6, abs=1e-9)
    mine, theirs = predictions(folder, "alone"), predictions(folder, way)
    assert [row["row"] for row in theirs] == list(range(42))
    for row, other in zip(mine, theirs, strict=True):
        assert row["prediction"] == other["prediction"]
        assert row["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)
