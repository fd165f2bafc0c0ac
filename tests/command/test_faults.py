"""Files that are torn, lost or edited, and disks that are full: one clear line, and what was whole stays whole."""

import shutil

import pytest
from lightning.pytorch import Callback

from lora_lightning import Checkpoints, FreezeBase, Resume, RunReport
from lora_lightning.training.checkpoints.file_io import PREVIOUS, check_whole
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from tests.command.process import command, files_in, mistake
from tests.training.resuming import checkpoints, fit


@pytest.fixture
def again(trained, tmp_path):
    """A copy of a finished run where the command looks for it, and the commands that go on with it."""
    folder = tmp_path / "runs" / "tiny" / "version_0"
    shutil.copytree(trained, folder)
    return folder


# ---- damaged checkpoints


@pytest.mark.parametrize("how", ["torn", "gone"])
def test_auto_goes_on_from_the_one_before_a_damaged_newest_in_the_same_run(how, again, tiny, monkeypatch):
    last = again / "checkpoints" / "last.ckpt"
    (again / "checkpoints" / "best.ckpt").touch()  # younger than both
    if how == "gone":
        last.unlink()
    else:
        last.write_bytes(last.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="last.ckpt"):
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


@pytest.mark.parametrize(("old", "new"), [("r: 4", "r: 2"), ("- classifier", "- pooler")], ids=["rank", "head"])
def test_a_config_that_was_edited_by_hand_is_one_line_and_leaves_all_as_it_was(old, new, again, monkeypatch, capsys):
    file = again / "config.yaml"
    file.write_text(file.read_text().replace(old, new, 1))
    before = files_in(again.parent)
    assert "was trained with lora." in mistake(monkeypatch, capsys, "test", "--ckpt_path", again)
    assert files_in(again.parent) == before


def test_a_damaged_report_is_put_aside_and_a_test_still_tells(again, monkeypatch):
    content = '{"val_accuracy": 0.'
    (again / "report.json").write_text(content)
    with pytest.warns(UserWarning, match=r"is no JSON object and is now 'report\.json\.damaged'"):
        command(monkeypatch, "test", "--ckpt_path", again)
    assert (again / "report.json.damaged").read_text() == content
    assert '"test_accuracy"' in (again / "report.json").read_text()


def test_a_checkpoints_folder_that_is_deleted_in_a_fit_is_made_again_and_the_fit_ends(tiny, tmp_path):
    class Deletes(Callback):
        """In step 14; and the first epoch is the best, so that nothing writes `best.ckpt` again."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 14:
                shutil.rmtree(checkpoints(tmp_path))

        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("rises", float(trainer.current_epoch))

    saves = Checkpoints(monitor="rises", mode="min", save_every=2)
    with pytest.warns(UserWarning, match=r"best\.ckpt' is gone"):
        fit(tiny, tmp_path, callbacks=[Deletes(), FreezeBase(False), Resume(), saves, RunReport()])
    assert load_checkpoint(checkpoints(tmp_path) / "last.ckpt")["global_step"] == 18
