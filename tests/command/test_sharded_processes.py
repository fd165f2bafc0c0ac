"""SIGTERM where W0 lies in parts: all processes leave after one step, and the fit goes on to the same bytes."""

import pytest

from lora_lightning.training.checkpoints.file_io import check_whole
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from tests.command.process import REPOSITORY
from tests.command.test_several_processes import MIDDLE, end_of, fit, interrupted
from tests.command.warm import run_all
from tests.training.resuming import differing


@pytest.fixture(scope="module", params=[pytest.param("fsdp2", marks=pytest.mark.slow)])
def played(request, tiny, tmp_path_factory):
    """Uninterrupted; and asked to leave by a signal to the second process, then started again."""
    folder = tmp_path_factory.mktemp(request.param)
    given = {"overlay": REPOSITORY / f"configs/strategy/{request.param}.yaml"}
    first, again = interrupted(tiny, "asked", f"term:1:{MIDDLE}", **given)
    first["keep"] = "runs/asked/version_0/checkpoints"
    cases = [fit(tiny, "whole", **given), first, again]
    return {**run_all(cases, folder), "folder": folder, "overlay": request.param}


def test_sigterm_leaves_one_whole_checkpoint_and_asks_to_be_started_again(played):
    asked = played["asked"]
    assert asked.codes == [75, 0], asked
    assert asked.everything.count("goes on from there") == 1, asked
    kept = played["folder"] / "asked.kept"
    last = kept / "last.ckpt"
    check_whole(last)
    assert load_checkpoint(last)["global_step"] == MIDDLE + 1
    assert {path.name for path in kept.iterdir()} == {"best.ckpt", "last.ckpt", "last.ckpt.previous"}


def test_a_sharded_fit_that_sigterm_interrupted_ends_in_the_bytes_of_one_that_was_not(played):
    for name in ("whole", "asked-again"):
        assert played[name].codes == [0, 0], played[name]
    whole, again = end_of(played["folder"], "whole"), end_of(played["folder"], "asked")
    assert whole["step"] == 9
    assert differing(whole, again) == []
