"""Finding a checkpoint from what a person would write."""

import os
import shutil

import pytest
import torch

from lora_lightning import LoRAError
from lora_lightning.training.checkpoints.run_folder import find_checkpoint, load_checkpoint, run_of_checkpoint


def test_a_run_is_found_by_file_by_version_and_by_name(trained):
    best = trained / "checkpoints" / "best.ckpt"
    for path in (best, trained, trained.parent):
        assert find_checkpoint(path) == best
        assert run_of_checkpoint(find_checkpoint(path)) == trained
    assert find_checkpoint(trained, "last").name == "last.ckpt"


def test_the_newest_version_with_checkpoints_counts(tmp_path):
    for version in ("version_2", "version_10"):
        (tmp_path / version / "checkpoints").mkdir(parents=True)
        (tmp_path / version / "checkpoints" / "best.ckpt").touch()
    (tmp_path / "version_11").mkdir()
    assert find_checkpoint(tmp_path).parent.parent.name == "version_10"


def test_best_is_asked_of_model_checkpoint_where_no_file_has_that_name(trained, tmp_path):
    folder = tmp_path / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    content = load_checkpoint(trained / "checkpoints" / "best.ckpt")
    content["callbacks"] = {"ModelCheckpoint{}": {"best_model_path": "/elsewhere/epoch=1.ckpt"}}
    for number in (1, 2, 3):
        torch.save(content, folder / f"epoch={number}.ckpt")
        os.utime(folder / f"epoch={number}.ckpt", (number, number))
    assert find_checkpoint(tmp_path).name == "epoch=1.ckpt"
    assert find_checkpoint(tmp_path, "last").name == "epoch=3.ckpt"


def test_a_path_that_is_not_there_names_its_neighbour(trained):
    with pytest.raises(LoRAError, match=r"did you mean '.*tiny'"):
        find_checkpoint(trained.parent.parent / "tinny")


def test_a_folder_without_checkpoints_says_what_to_do(tmp_path):
    with pytest.raises(LoRAError, match="run `lora-lightning fit` first"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a checkpoint"])
def test_a_torn_checkpoint_is_one_clear_error(trained, tmp_path, damage):
    file = shutil.copy(trained / "checkpoints" / "best.ckpt", tmp_path / "torn.ckpt")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(LoRAError, match=r"not a whole checkpoint|not a Lightning checkpoint"):
        load_checkpoint(file)
