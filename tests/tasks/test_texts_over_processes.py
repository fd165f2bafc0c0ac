"""Two processes find what one does, to the rounding of sums: no row is seen twice, and every figure is of sums."""

import json
import subprocess
import sys

import pytest

from tests.command.process import REPOSITORY
from tests.tasks.ragged_texts import figures, make


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path):
    make(tmp_path)
    # In a process of its own: what torch has started must not be forked.
    command = [sys.executable, "-m", "tests.tasks.ragged_texts", str(tmp_path), "2"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    two, one = json.loads((tmp_path / "figures.json").read_text()), figures(tmp_path, 1)
    assert set(one) == {"tagger", "t5", "gpt2"}
    for kind in one:
        assert two[kind] == pytest.approx(one[kind], rel=1e-6), kind
        assert {"val/loss", "val/accuracy" if kind == "tagger" else "val/bleu"} <= set(one[kind])
