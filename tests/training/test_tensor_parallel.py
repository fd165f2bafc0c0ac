"""Tensor parallelism: laws 1, 2, 7, 8 and 9 where layers are split within themselves."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from lora_lightning.lora.adapter import adapter_tensors
from lora_lightning.training.run import load_checkpoint
from tests.processes import REPOSITORY
from tests.training import sharded, split
from tests.training.resuming import differing


def script(name, folder, processes, timeout=300):
    command = [sys.executable, "-m", "tests.training.split", name, str(folder), str(processes)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A folder of what two processes found; it began with a checkpoint of one process."""
    folder = tmp_path_factory.mktemp("split")
    begun(folder)
    script("quick", folder, 2)
    return folder


def begun(folder):
    sharded.fit(folder / "alone", made=split.trained)
    shutil.copyfile(sharded.at(folder / "alone", 14), folder / "one.ckpt")


# Pieces alone.


@pytest.fixture(scope="module")
def pieces(found):
    return torch.load(found / "pieces.pt")


@pytest.mark.parametrize("case", split.CASES)
def test_a_split_model_is_the_model_in_outputs_gradients_and_fingerprint(pieces, case):
    for own in pieces:
        assert own[case]["far"] < 1e-12, own[case]
        assert own[case]["fingerprint"]
        assert own[case]["moved"]


def test_a_fresh_adapter_changes_nothing_bit_for_bit(pieces):
    for own in pieces:
        assert own["fresh"] == dict.fromkeys(own["fresh"], True)


@pytest.mark.slow
def test_four_processes_in_two_groups_are_the_model(tmp_path):
    script("alone_in_groups", tmp_path, 4)
    for own in torch.load(tmp_path / "pieces.pt"):
        for case in split.CASES:
            assert own[case]["far"] < 1e-12, (case, own[case])
            assert (own[case]["fingerprint"], own[case]["moved"]) == (True, True)


# Law 9.


def assert_equal_to_one(folder, names):
    for name in names:
        one, ours = split.fit(name, 4), torch.load(folder / f"{name}.pt")
        tolerance = 1e-6 if "float32" in name else 1e-9
        assert ours["steps"] == one["steps"] >= 20
        for key, value in one["adapter"].items():
            assert split.far(value, ours["adapter"][key]) < tolerance, (name, key)
        assert ours["losses"] == pytest.approx(one["losses"], rel=tolerance)
        assert ours["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
    assert torch.load(folder / "alike.pt") == [True] * len(names)


def test_two_processes_equal_one(found):
    assert_equal_to_one(found, split.QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_family_in_one_group_and_in_two_equals_one_process(tmp_path, processes):
    script("equality", tmp_path, processes)
    assert_equal_to_one(tmp_path, split.FITS)


# Law 8, and what checkpoints hold.


def assert_lived(folder):
    lived = torch.load(folder / "found.pt", weights_only=False)
    for form in ("file", "folder"):
        assert differing(lived[f"{form} whole"], lived[f"{form} from 9"]) == []
    assert differing(lived["file whole"], lived["file from 14"]) == []
    assert differing(lived["file whole"], lived["folder whole"]) == []
    assert lived["of one process"]["step"] == lived["file whole"]["step"] == 21
    return lived


@pytest.fixture(scope="module")
def lived(found):
    return torch.load(found / "found.pt", weights_only=False)


def test_a_resumed_fit_is_the_uninterrupted_one_in_both_forms(found):
    assert_lived(found)


@pytest.mark.slow
def test_a_run_of_two_groups_lives(tmp_path):
    begun(tmp_path)
    script("life", tmp_path, 4)
    assert_lived(tmp_path)


def test_a_file_is_that_of_a_single_process_and_holds_no_weight_of_the_base(found):
    many, one = load_checkpoint(sharded.at(found / "file", 14)), load_checkpoint(found / "one.ckpt")
    assert many.keys() == one.keys()
    assert {k: v.shape for k, v in many["state_dict"].items()} == {k: v.shape for k, v in one["state_dict"].items()}
    assert list(many["state_dict"]) == list(one["state_dict"])
    assert many["lora_lightning"]["base"] == one["lora_lightning"]["base"]
    (ours,), (theirs,) = many["optimizer_states"], one["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    shapes = [{i: {k: v.shape for k, v in own.items()} for i, own in s["state"].items()} for s in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert {k.removeprefix("backbone.") for k in many["state_dict"]} == adapter_tensors(split.trained().backbone).keys()


def test_a_folder_read_by_one_process_is_the_file(found):
    parts, file = (load_checkpoint(sharded.at(found / form, 9)) for form in ("folder", "file"))
    assert differing(parts["state_dict"], file["state_dict"]) == []
    for i, own in file["optimizer_states"][0]["state"].items():
        assert differing(parts["optimizer_states"][0]["state"][i], own) == []


@pytest.mark.parametrize("form", ["file", "folder"])
def test_one_process_goes_on_evaluates_and_predicts_as_the_group_did(found, lived, form, tmp_path):
    trainer = sharded.fit(tmp_path, made=split.trained, ckpt=sharded.at(found / form, 14))
    assert trainer.global_step == 21
    alone, many = split.figures(trainer, sharded.at(found / form, 9)), dict(lived[f"{form} figures"])
    torch.testing.assert_close(many.pop("predicted"), alone.pop("predicted"), rtol=1e-5, atol=1e-5)
    assert many == pytest.approx(alone, rel=1e-5)
    assert {"test/loss", "val/loss", "test/accuracy"} <= many.keys()


def test_a_write_into_one_part_of_the_base_and_a_bad_loss_stop_all(lived):
    moved = "W0MovedError: W0 moved during fit: 1 frozen tensors changed, first 'layers.1.up.weight'"
    bad = "NotFiniteError: the loss of optimizer step 5 is not finite"
    assert [said.startswith(moved) for said in lived["stopped by w0"]] == [True, True]
    assert [said.startswith(bad) for said in lived["stopped by loss"]] == [True, True]


def test_each_prediction_is_written_once(found):
    lines = (found / "file" / "run" / "version_0" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(13))
