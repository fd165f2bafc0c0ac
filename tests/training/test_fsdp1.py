"""FSDP1: laws 2, 3, 7, 8 and 9 where W0 lies in parts and the adapter is whole in every process.

Mutations that were made once, and what then fails:

| mutation | test |
|---|---|
| no `_keep_in_place` | test_several_processes_equal_one..., by the language model |
| NumPy sees what is gathered, and not a copy of it | all that ask for a fingerprint |
| parameters that blocks share go into one block's unit | "one table for all blocks" |
| no `same_subtracted_start` | test_processes_that_drew_differently... |
"""

import csv
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from lora_lightning import FSDP1Strategy, LoRAError
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.training.checkpoints.file_io import WholeFiles
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from lora_lightning.training.fsdp1_units import full_bytes
from lora_lightning.training.trainer import LoRATrainer
from tests.command.process import run
from tests.processes import REPOSITORY
from tests.training import sharded, units
from tests.training.resuming import differing
from tests.training.test_fsdp2 import assert_equal_to_one


def script(*args, timeout=300):
    command, env = [sys.executable, "-m", "tests.training.units", *map(str, args)], os.environ | {"LIMIT": str(timeout)}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


# Bit for bit.


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    folder = tmp_path_factory.mktemp("units")
    script("beside", folder, 2)
    return json.loads((folder / "beside.json").read_text())


@pytest.mark.parametrize("case", units.CASES)
def test_a_model_in_units_is_the_model_in_outputs_gradients_names_and_fingerprint(beside, case):
    assert [found[case] for found in beside] == [[], []]


def test_texts_of_unlike_length_are_written_by_all_processes_together(beside):
    assert [found["generation"] for found in beside] == [True, True]


def test_a_blocks_weights_are_there_for_its_forward_and_its_backward_only(beside):
    for found in beside:
        forward, between, backward, after = found["sizes"]
        assert forward == backward > 0 == between == after


@pytest.mark.slow
def test_four_processes_of_which_some_have_nothing_of_a_block(tmp_path):
    script("beside", tmp_path, 4)
    for found in json.loads((tmp_path / "beside.json").read_text()):
        assert {case: found[case] for case in units.CASES} == {case: [] for case in units.CASES}


# A run's life.


@pytest.fixture(scope="module", params=[pytest.param(count, marks=pytest.mark.slow) for count in (2, 4)])
def lived(request, tmp_path_factory):
    """What two or four processes found, and a folder with their runs; some began with a checkpoint of one process."""
    folder = tmp_path_factory.mktemp("life")
    sharded.fit(folder / "alone")
    shutil.copyfile(sharded.at(folder / "alone", 14), folder / "one.ckpt")  # at an epoch's end
    script("life", folder, request.param, timeout=900)
    return folder, torch.load(folder / "found.pt", weights_only=False)


def count_of(found):
    return len(found["stopped by loss"])


def test_several_processes_equal_one_over_accumulated_and_ragged_batches(lived):
    assert_equal_to_one(lived[0], count_of(lived[1]))


def test_processes_that_drew_differently_subtract_one_start(lived):
    """Under DDP, told to send no buffers."""
    first, *others = lived[1]["starts"]
    assert others
    assert all(differing(first, other) == [] for other in others)


@pytest.mark.parametrize("step", [9, 14])
def test_a_resumed_fit_is_the_uninterrupted_one(lived, step):
    _, found = lived
    assert differing(found["whole"], found[f"from {step}"]) == []


def test_a_checkpoint_is_that_of_a_single_process_and_holds_no_weight_of_the_base(lived):
    folder, _ = lived
    many, one = load_checkpoint(sharded.at(folder / "whole", 14)), load_checkpoint(folder / "one.ckpt")
    assert many.keys() == one.keys()
    assert list(many["state_dict"]) == list(one["state_dict"])
    assert {k: v.shape for k, v in many["state_dict"].items()} == {k: v.shape for k, v in one["state_dict"].items()}
    assert many["lora_lightning"]["base"] == one["lora_lightning"]["base"]
    assert many["optimizer_states"][0]["param_groups"] == one["optimizer_states"][0]["param_groups"]
    made = sharded.module(torch.float32, modules_to_save=["norm"])
    assert {k.removeprefix("backbone.") for k in many["state_dict"]} == adapter_tensors(made.backbone).keys()


def test_one_process_goes_on_and_evaluates_and_several_go_on_from_one(lived, tmp_path):
    folder, found = lived
    trainer = sharded.fit(tmp_path / "on", ckpt=sharded.at(folder / "whole", 14))
    assert trainer.global_step == found["whole"]["step"] == found["of one"]["step"]
    alone, many = sharded.figures(trainer, sharded.at(folder / "whole", 9)), found["figures"]
    torch.testing.assert_close(many.pop("predicted"), alone.pop("predicted"), rtol=1e-5, atol=1e-5)
    assert many == pytest.approx(alone, rel=1e-5)
    assert {"test/loss", "val/loss", "test/accuracy"} <= many.keys()


def test_a_fit_under_autocast_reports_and_leaves_the_export_to_the_command(lived):
    folder = lived[0] / "bf16" / "run" / "version_0"
    report = json.loads((folder / "report.json").read_text())
    assert (report["steps"], report["w0_unchanged"]) == (2, True)
    made = sharded.module(torch.float32, modules_to_save=["norm"])
    assert report["full_checkpoint_bytes"] == full_bytes(made.backbone)
    assert not (folder / "export").exists()
    rows = list(csv.DictReader((folder / "rank.csv").open()))
    assert len(rows) == 2 * 6
    assert all(float(row["amplification"]) > 0 and 0 < float(row["relative"]) < 1 for row in rows)


def test_a_write_into_one_processs_part_of_the_base_stops_all(lived):
    moved = "W0MovedError: W0 moved during fit: 1 frozen tensors changed, first 'layers.1."
    assert all(said.startswith(moved) for said in lived[1]["stopped by w0 end"]), lived[1]


def test_a_loss_that_is_not_finite_in_one_process_stops_all(lived):
    bad = "NotFiniteError: the loss of optimizer step 5 is not finite"
    assert all(said.startswith(bad) for said in lived[1]["stopped by loss"])


# What is found, and what is said.


def test_a_word_is_enough_for_the_defaults():
    trainer = LoRATrainer(strategy="fsdp1", accelerator="cpu", devices=2, logger=False)
    assert isinstance(trainer.strategy, FSDP1Strategy)
    assert isinstance(trainer.strategy.checkpoint_io, WholeFiles)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"compile": True}, "FSDP1 gathers W0 in hooks that torch.compile does not see"),
        ({"init": "eva"}, "lora.init=eva is measured on a whole model, and FSDP1 shards it"),
    ],
)
def test_what_cannot_be_done_in_parts_is_refused_with_the_way_out(changed, said, tmp_path):
    made = sharded.module(torch.float32, **{k: v for k, v in changed.items() if k == "init"})
    if "compile" in changed:
        from lora_lightning.training.activations.compilation import TrainingForward

        made.training_forward = TrainingForward(made.backbone, checkpointing=False, offload=False, compile=True)
    trainer = sharded.trainer_of(folder=tmp_path, strategy=FSDP1Strategy(), devices=1)
    with pytest.raises(LoRAError, match=said):
        trainer.fit(made, sharded.Shuffled())


def test_one_process_keeps_w0_whole_and_trains_as_under_ddp(tmp_path):
    given = {"devices": 1, "max_epochs": 1}
    ddp, ours = (sharded.fit(tmp_path / str(i), strategy=s, **given) for i, s in enumerate(("ddp", FSDP1Strategy())))
    assert ours.lightning_module.backbone.layers[0].up.weight.dim() == 2
    assert differing(sharded.ended(ddp), sharded.ended(ours)) == []


# The command.


@pytest.mark.slow
def test_the_command_fits_and_tests_in_four_processes_predicts_in_two_and_exports(tiny, tmp_path):
    both = ["--config", tiny.config, "--config", REPOSITORY / "configs/strategy/fsdp1.yaml"]
    four = ["--trainer.devices", "4"]
    run("fit", *both, *four, "--trainer.max_epochs", "2", cwd=tmp_path, timeout=900)
    run("test", "--ckpt_path", "runs/tiny", cwd=tmp_path, timeout=900)
    run("predict", "--ckpt_path", "runs/tiny", "--trainer.devices", "2", cwd=tmp_path)
    run("export", "--ckpt_path", "runs/tiny", cwd=tmp_path)
    report = json.loads((tmp_path / "runs/tiny/version_0/report.json").read_text())
    assert report["w0_unchanged"]
    assert report["export_max_rel_diff"] < 1e-5
    assert {"test_accuracy", "val_accuracy"} <= report.keys()
    assert len((tmp_path / "runs/tiny/version_0/predict/predictions.jsonl").read_text().splitlines()) == 40
