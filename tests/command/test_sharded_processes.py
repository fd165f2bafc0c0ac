"""SIGTERM where W0 lies in parts: all processes leave after one step, and the fit goes on to the same bytes."""

import pytest

from lora_lightning.training.checkpoint_io import check_whole
from lora_lightning.training.run import load_checkpoint
from tests.command.process import REPOSITORY
from tests.command.test_several_processes import MIDDLE, end_of, fit, interrupted
from tests.command.warm import run_all
from tests.training.resuming import differing

OVERLAYS = ["fsdp2", "fsdp2-folder"]


def cases_of(tiny, overlay):
    """Uninterrupted; and asked to leave by a signal to the second process, then started again."""
    given = {"overlay": REPOSITORY / f"configs/strategy/{overlay}.yaml"}
    first, again = interrupted(tiny, f"{overlay}-asked", f"term:1:{MIDDLE}", **given)
    first["keep"] = f"runs/{overlay}-asked/version_0/checkpoints"
    return [fit(tiny, overlay, **given), first, again]


@pytest.fixture(scope="module")
def played(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    cases = [case for overlay in OVERLAYS for case in cases_of(tiny, overlay)]
    return {**run_all(cases, folder), "folder": folder}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_sigterm_leaves_one_whole_checkpoint_and_asks_to_be_started_again(played, overlay):
    asked = played[f"{overlay}-asked"]
    assert asked.codes == [75, 0], asked
    assert asked.everything.count("goes on from there") == 1, asked
    kept = played["folder"] / f"{overlay}-asked.kept"
    last = kept / "last.ckpt"
    check_whole(last)
    assert last.is_dir() == (overlay == "fsdp2-folder")
    assert load_checkpoint(last)["global_step"] == MIDDLE + 1
    assert {path.name for path in kept.iterdir()} == {"best.ckpt", "last.ckpt", "last.ckpt.previous"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_sharded_fit_that_sigterm_interrupted_ends_in_the_bytes_of_one_that_was_not(played, overlay):
    for name in (overlay, f"{overlay}-asked-again"):
        assert played[name].codes == [0, 0], played[name]
    whole, again = end_of(played["folder"], overlay), end_of(played["folder"], f"{overlay}-asked")
    assert whole["step"] == 9
    assert differing(whole, again) == []
