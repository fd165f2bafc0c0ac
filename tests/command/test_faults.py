"""Files that are torn, lost or edited, and disks that are full: one clear line, and what was whole stays whole."""

import random
import resource
import shutil

import pytest
import torch
from lightning.pytorch import Callback

from lora_lightning import Checkpoints, FreezeBase, Resume, RunReport
from lora_lightning.lora.errors import LoRAError
from lora_lightning.training.checkpoints.file_io import PREVIOUS, DamagedCheckpointError, check_whole
from lora_lightning.training.checkpoints.run_folder import find_checkpoint, load_checkpoint
from tests.command.process import command, files_in, mistake
from tests.training.resuming import checkpoints, fit


@pytest.fixture
def again(trained, tmp_path):
    """A copy of a finished run where the command looks for it, and the commands that go on with it."""
    folder = tmp_path / "runs" / "tiny" / "version_0"
    shutil.copytree(trained, folder)
    return folder


# ---- damaged checkpoints


def damaged_copies(whole):
    """Cut at 50 places and with one bit flipped at 200, the first and the last byte among them."""
    rng = random.Random(4)
    yield from (whole[:length] for length in [0, 1, len(whole) - 1, *rng.sample(range(len(whole)), 47)])
    for place in [0, len(whole) - 1, *rng.sample(range(len(whole)), 198)]:
        yield whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :]


def same(one, other):
    """Whether two pieces of a checkpoint are one to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_wherever_a_real_checkpoint_is_cut_or_flipped_the_one_before_it_is_taken_aloud_or_nothing_read_is_another(
    again,
):
    """A bit between two entries of the zip, or of what it says twice, is not read."""
    last = again / "checkpoints" / "last.ckpt"
    whole, sound, before = last.read_bytes(), load_checkpoint(last), load_checkpoint(f"{last}{PREVIOUS}")
    torch.save(before | {"global_step": 1}, f"{last}{PREVIOUS}")
    alone, found = again / "alone.ckpt", 0
    for number, content in enumerate(damaged_copies(whole)):
        alone.write_bytes(content)
        try:
            read = load_checkpoint(alone)
        except DamagedCheckpointError as error:
            found += "alone.ckpt' is not a whole checkpoint" in str(error)
        else:
            assert len(content) == len(whole)
            assert same(read, sound)
            continue
        if number % 25 == 0:
            last.write_bytes(content)
            with pytest.warns(UserWarning, match="is not a whole checkpoint.*the one before it is used"):
                assert load_checkpoint(last)["global_step"] == 1
    assert found > 100


@pytest.mark.parametrize("how", ["zero bytes", "torn", "gone"])
def test_auto_goes_on_from_the_one_before_a_damaged_newest_in_the_same_run(how, again, tiny, monkeypatch):
    last = again / "checkpoints" / "last.ckpt"
    (again / "checkpoints" / "best.ckpt").touch()  # younger than both
    if how == "gone":
        last.unlink()
    else:
        last.write_bytes(b"" if how == "zero bytes" else last.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="the one before it is used"):
        command(monkeypatch, "fit", "--config", tiny.config, "--trainer.max_epochs", "7", "--ckpt_path", "auto")
    assert [p.name for p in again.parent.glob("version_*")] == ["version_0"]
    for file in (last, last.with_name(last.name + PREVIOUS)):
        check_whole(file)
    assert load_checkpoint(last)["epoch"] == 7


def test_what_is_damaged_never_takes_the_place_of_the_whole_one_before_it(again):
    """A fit that went on from the one before, and is killed between two moves."""
    from lora_lightning.training.checkpoints.file_io import _keep_previous

    last = again / "checkpoints" / "last.ckpt"
    before = last.with_name(last.name + PREVIOUS)
    last.write_bytes(last.read_bytes()[:-5])
    _keep_previous(last)
    check_whole(before)


@pytest.mark.parametrize("word", ["auto", "last", "best"])
def test_where_no_whole_one_is_left_one_line_says_so_and_nothing_is_written(word, again, tiny, monkeypatch, capsys):
    for file in (again / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:500])
    before = files_in(again.parent)
    action = ["test"] if word == "best" else ["fit", "--trainer.max_epochs", "7"]
    said = mistake(monkeypatch, capsys, *action, "--config", tiny.config, "--ckpt_path", word)
    assert "is not a whole checkpoint" in said
    assert files_in(again.parent) == before


EDITS = {
    "a bracket left open": ("model:", "model: [", "no YAML: while parsing a flow"),
    "a tab": ("  max_epochs:", "\tmax_epochs:", "line 11: no YAML: "),
    "a key with a letter less": ("max_epochs", "max_epoch", "unknown key trainer.max_epoch;"),
    "another rank": ("r: 4", "r: 2", "was trained with lora."),
    "another head": ("- classifier", "- pooler", "was trained with lora."),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_config_that_was_edited_by_hand_is_one_line_and_leaves_all_as_it_was(edit, again, monkeypatch, capsys):
    (old, new, said), file = EDITS[edit], again / "config.yaml"
    file.write_text(file.read_text().replace(old, new, 1))
    before = files_in(again.parent)
    assert said in mistake(monkeypatch, capsys, "test", "--ckpt_path", again)
    assert files_in(again.parent) == before


def test_a_newest_that_is_gone_is_found_by_the_one_before_it(again):
    (again / "checkpoints" / "last.ckpt").unlink()
    (again / "checkpoints" / "best.ckpt").unlink()
    assert find_checkpoint(again, "last").name == "last.ckpt"
    with pytest.warns(UserWarning, match=r"No such file.*the one before it is used"):
        assert load_checkpoint(find_checkpoint(again.parent, "last"))["state_dict"]


# ---- files edited by hand


@pytest.mark.parametrize("content", ['{"val_accuracy": 0.', "[]", ""])
def test_a_damaged_report_is_put_aside_and_a_test_still_tells(content, again, monkeypatch, capsys):
    (again / "report.json").write_text(content)
    with pytest.warns(UserWarning, match=r"is no JSON object and is now 'report\.json\.damaged'"):
        command(monkeypatch, "test", "--ckpt_path", again)
    assert (again / "report.json.damaged").read_text() == content
    assert '"test_accuracy"' in (again / "report.json").read_text()


# ---- disks and folders


@pytest.mark.parametrize("place", ["/proc/none", "a file"])
def test_a_runs_dir_that_cannot_be_written_is_one_line(place, tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "a file").touch()
    said = mistake(monkeypatch, capsys, "fit", "--config", tiny.config, "--runs_dir", place)
    assert place in said
    assert ("there is no" if place == "/proc/none" else "give another --runs_dir") in said


class At(Callback):
    """Does something at the start of a step."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.do()


def watched(step, do, **saves):
    return [FreezeBase(False), Resume(), At(step, do), Checkpoints(**saves), RunReport()]


def ends_as_uninterrupted(tiny, folder):
    """From `last.ckpt` on."""
    whole = fit(tiny, folder / "whole", callbacks=watched(0, lambda: None))
    on = fit(tiny, folder, ckpt=checkpoints(folder) / "last.ckpt", callbacks=watched(0, lambda: None))
    ours, wanted = on.lightning_module.state_dict(), whole.lightning_module.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in wanted.items())


def test_a_disk_that_fills_up_in_a_fit_ends_it_in_one_error_and_the_fit_goes_on_once_there_is_room(tiny, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # noqa: E731
    try:
        with pytest.raises(
            LoRAError, match=r"last\.ckpt' could not be written \(.*too large.*older checkpoints are as"
        ):
            fit(tiny, tmp_path, callbacks=watched(8, full, save_every=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    names = {p.name for p in checkpoints(tmp_path).iterdir()}
    assert names == {"best.ckpt", "last.ckpt", f"last.ckpt{PREVIOUS}"}, "nothing half-written is left"
    assert load_checkpoint(checkpoints(tmp_path) / "last.ckpt")["global_step"] == 8
    ends_as_uninterrupted(tiny, tmp_path)


def test_a_checkpoints_folder_that_becomes_unwritable_is_one_error_and_what_was_there_is_whole(tiny, tmp_path):
    folder, moved = checkpoints(tmp_path), tmp_path / "moved"

    def take():
        folder.rename(moved)
        folder.touch()

    with pytest.raises(LoRAError, match=r"could not be written \(.*(Not a directory|File exists)"):
        fit(tiny, tmp_path, callbacks=watched(8, take, save_every=2))
    assert load_checkpoint(moved / "last.ckpt")["global_step"] == 8


def test_a_checkpoints_folder_that_is_deleted_in_a_fit_is_made_again_and_the_fit_ends(tiny, tmp_path):
    class Rises(Callback):
        """The first epoch is the best: nothing writes `best.ckpt` again."""

        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("rises", float(trainer.current_epoch))

    delete = lambda: shutil.rmtree(checkpoints(tmp_path))  # noqa: E731
    given = [Rises(), *watched(14, delete, monitor="rises", mode="min", save_every=2)]
    with pytest.warns(UserWarning, match=r"best\.ckpt' is gone"):
        fit(tiny, tmp_path, callbacks=given)
    assert load_checkpoint(checkpoints(tmp_path) / "last.ckpt")["global_step"] == 18
