"""FSDP2: laws 2, 7, 8 and 9 where W0 and the adapter lie in parts.

Mutations that were made once, and what then fails:

| mutation | test |
|---|---|
| no broadcast of process 0's values | the same, all cases |
| `moved` looks at one process's parts only | the same, by the write into one part |
| a weight that reads as adapted is read so as a shard too | the same, "attention of torch" and "bare parameters" |
| no `gather_before` of `generate` | test_texts_of_unlike_length... |
| what lies outside of the blocks stays gathered after a validation | all that rest on `lived`, by law 10's check |
| a process with a batch less does not run on | the same: it hangs, and is ended after the time limit |
"""

import functools
import json
import shutil
import subprocess
import sys

import pytest
import torch

from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.reports.console import backbone_name
from lora_lightning.training.checkpoints.file_io import WholeFiles
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from lora_lightning.training.strategies.fsdp2.strategy import FSDP2Strategy
from lora_lightning.training.strategies.fsdp2.wrapping import groups_of, named_blocks, shard
from lora_lightning.training.trainer import LoRATrainer
from tests.command.process import run
from tests.distributed import one_process
from tests.processes import REPOSITORY
from tests.training import ragged, sharded, shards
from tests.training.resuming import differing


def script(name, *args, timeout=300):
    command = [sys.executable, "-m", f"tests.training.{name}", *map(str, args)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


# Bit for bit.


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    file = tmp_path_factory.mktemp("shards") / "found.json"
    script("shards", 2, file)
    return json.loads(file.read_text())


@pytest.mark.parametrize("case", shards.CASES)
def test_a_sharded_model_is_the_model_in_outputs_gradients_and_fingerprint(beside, case):
    assert [found[case] for found in beside] == [[], []]


def test_texts_of_unlike_length_are_written_by_all_processes_together(beside):
    assert [found["generation"] for found in beside] == [True, True]


def test_what_cannot_be_sharded_is_refused_by_name(beside):
    said = beside[1]["refusals"]
    assert "blocks.0.q.lora_A, blocks.0.q.lora_B" in said["a trained layer in two blocks"]
    assert "temperature" in said["a trained scalar"]
    assert "'block.*' fits no module with parameters; did you mean 'blocks.2'" in said["no such module"]


@pytest.mark.slow
def test_four_processes_of_which_some_have_no_row(tmp_path):
    script("shards", 4, tmp_path / "found.json")
    for found in json.loads((tmp_path / "found.json").read_text()):
        assert {case: found[case] for case in shards.CASES} == {case: [] for case in shards.CASES}


# A run's life.


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """What two processes found, in a folder that holds their runs; it began with a checkpoint of one process."""
    folder = tmp_path_factory.mktemp("life")
    sharded.fit(folder / "alone")
    shutil.copyfile(sharded.at(folder / "alone", 14), folder / "one.ckpt")  # at an epoch's end
    script("sharded", "life", folder, 2)
    return folder, torch.load(folder / "found.pt", weights_only=False)


# Law 9.


@functools.cache
def whole(n):
    return ragged.fit(n, made=sharded.module())


def assert_equal_to_one(folder, processes):
    ones = {accumulate: whole(2 * processes * accumulate) for accumulate in (1, 3)}
    for name, (heads, steps) in sharded.LANGUAGE_MODELS.items():
        data, made = sharded.Sentences(2 * processes), sharded.language_model(heads)
        ones[name] = ragged.fit(0, data=data, made=made, max_steps=steps)
    for name, one in ones.items():
        ours = torch.load(folder / f"{name}.pt")
        assert ours["steps"] == one["steps"] >= 12
        for key, value in one["adapter"].items():
            assert float((ours["adapter"][key] - value).abs().max() / value.abs().max()) < 1e-9, key
        assert ours["losses"] == pytest.approx(one["losses"], rel=1e-9)
        assert ours["metrics"] == pytest.approx(one["metrics"], rel=1e-6)


def test_two_processes_equal_one_over_accumulated_and_ragged_batches(lived):
    assert_equal_to_one(lived[0], 2)


@pytest.mark.slow
def test_four_processes_equal_one(tmp_path):
    script("sharded", "equality", tmp_path, 4)
    assert_equal_to_one(tmp_path, 4)


# Law 8, and what checkpoints hold.


@pytest.mark.parametrize("step", [9, 14])
def test_a_resumed_sharded_fit_is_the_uninterrupted_one(lived, step):
    _, found = lived
    assert differing(found["whole"], found[f"from {step}"]) == []


def test_a_file_is_that_of_a_single_process_and_holds_no_weight_of_the_base(lived):
    folder, _ = lived
    many, one = load_checkpoint(sharded.at(folder / "file", 14)), load_checkpoint(folder / "one.ckpt")
    assert many.keys() == one.keys()
    assert list(many["state_dict"]) == list(one["state_dict"])
    assert {k: v.shape for k, v in many["state_dict"].items()} == {k: v.shape for k, v in one["state_dict"].items()}
    assert many["lora_lightning"]["base"] == one["lora_lightning"]["base"]
    (ours,), (theirs,) = many["optimizer_states"], one["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    shapes = [{i: {k: v.shape for k, v in own.items()} for i, own in s["state"].items()} for s in (ours, theirs)]
    assert shapes[0] == shapes[1]
    made = sharded.module(torch.float32, modules_to_save=["norm"])
    assert {k.removeprefix("backbone.") for k in many["state_dict"]} == adapter_tensors(made.backbone).keys()


def test_no_process_ever_gathered_a_weight_of_the_base(lived):
    _, found = lived
    made = sharded.module(torch.float32, modules_to_save=["norm"])
    own = {tuple(t.shape) for t in adapter_tensors(made.backbone).values()}
    assert {tuple(shape) for shape in found["gathered"]} <= own


def test_one_process_goes_on_and_evaluates_from_a_sharded_fit(lived, tmp_path):
    folder, found = lived
    trainer = sharded.fit(tmp_path / "on", ckpt=sharded.at(folder / "file", 14))
    assert trainer.global_step == found["whole"]["step"]
    alone = sharded.figures(trainer, sharded.at(folder / "file", 9))
    many = found["figures"]
    torch.testing.assert_close(many.pop("predicted"), alone.pop("predicted"), rtol=1e-5, atol=1e-5)
    assert many == pytest.approx(alone, rel=1e-5)
    assert {"test/loss", "val/loss", "test/accuracy"} <= many.keys()


def test_two_processes_go_on_from_one(lived):
    _, found = lived
    assert found["of one process"]["step"] == found["whole"]["step"]


def test_a_fit_under_autocast_reports_and_leaves_the_export_to_the_command(lived):
    folder = lived[0] / "bf16" / "run" / "version_0"
    report = json.loads((folder / "report.json").read_text())
    assert report["steps"] == 2
    assert report["w0_unchanged"]
    assert not (folder / "export").exists()


def test_a_write_into_one_processs_part_of_the_base_stops_all(lived):
    _, found = lived
    moved = "W0MovedError: W0 moved during fit: 1 frozen tensors changed, first 'layers.1.up.weight'"
    assert [said.startswith(moved) for said in found["stopped by w0"]] == [True, True]


def test_a_loss_that_is_not_finite_in_one_process_stops_all(lived):
    _, found = lived
    bad = "NotFiniteError: the loss of optimizer step 5 is not finite"
    assert [said.startswith(bad) for said in found["stopped by loss"]] == [True, True]


def test_checkpoints_that_do_not_fit_are_refused_in_all_processes(lived):
    _, found = lived
    told = {
        "another rank": "the checkpoint was trained with lora.r=3, this run says 2",
        "another base": "layers.2.down.bias",
        "shapes": "lora_A' has shape (3, 17), expected (2, 17)",
        "keys": "left over 'backbone.layers.0.down.lora_A'",
    }
    assert found["misfits"].keys() == told.keys()
    for name, text in told.items():
        assert len(found["misfits"][name]) == 2
        assert all(text in said for said in found["misfits"][name]), (name, found["misfits"][name])


@pytest.mark.slow
def test_four_processes_go_on_from_two(lived):
    script("sharded", "onward", lived[0], 4)
    assert torch.load(lived[0] / "more.pt")["step"] == 21


def test_a_report_names_the_backbones_own_class_also_where_it_is_sharded():
    made = sharded.module()
    with one_process() as mesh:
        shard(made.backbone, mesh, torch.device("cpu"))
    assert type(made.backbone).__name__ == "FSDPNet"
    assert backbone_name(made.backbone) == "Net"


# What is found, and what is said.


def test_blocks_are_found_without_knowing_the_architecture():
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, MixtralConfig, MixtralModel

    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8))
    gpt2 = GPT2Model(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=9))
    experts = {"num_local_experts": 3, "vocab_size": 9, "num_attention_heads": 2, "num_key_value_heads": 2}
    mixtral = MixtralModel(MixtralConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, **experts))
    with torch.device("meta"):
        vit, resnet = timm.create_model("vit_tiny_patch16_224"), torchvision.models.resnet18()
        swin = torchvision.models.swin_t()
    assert list(groups_of(bert)) == [f"encoder.layer.{i}" for i in range(3)]
    assert list(groups_of(gpt2)) == ["h.0", "h.1"]
    assert list(groups_of(mixtral)) == ["layers.0", "layers.1"]
    assert list(groups_of(vit)) == [f"blocks.{i}" for i in range(12)]
    assert list(groups_of(resnet)) == [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    assert [name.count(".") for name in groups_of(swin)].count(2) == 12
    assert list(groups_of(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)))) == []
    assert list(named_blocks(bert, ["encoder.layer.*.attention", "pooler"])) == [
        *(f"encoder.layer.{i}.attention" for i in range(3)),
        "pooler",
    ]


def test_a_word_is_enough_for_the_defaults():
    trainer = LoRATrainer(strategy="fsdp2", accelerator="cpu", devices=2, logger=False)
    assert isinstance(trainer.strategy, FSDP2Strategy)
    assert isinstance(trainer.strategy.checkpoint_io, WholeFiles)


# The command.


@pytest.mark.slow
def test_the_command_fits_tests_predicts_and_exports(tiny, tmp_path):
    both = ["--config", tiny.config, "--config", REPOSITORY / "configs" / "strategy" / "fsdp2.yaml"]
    run("fit", *both, "--trainer.max_epochs", "2", cwd=tmp_path)
    run("test", "--ckpt_path", "runs/tiny", cwd=tmp_path)
    run("predict", "--ckpt_path", "runs/tiny", "--trainer.devices", "1", cwd=tmp_path)
    run("export", "--ckpt_path", "runs/tiny", cwd=tmp_path)
    folder = tmp_path / "runs" / "tiny" / "version_0"
    report = json.loads((folder / "report.json").read_text())
    assert report["w0_unchanged"]
    assert report["export_max_rel_diff"] < 1e-5
    assert {"test_accuracy", "val_accuracy"} <= report.keys()
    assert (folder / "export" / "adapter" / "adapter_config.json").is_file()
    assert next(folder.rglob("predictions.jsonl")).read_text().count("\n") > 10
