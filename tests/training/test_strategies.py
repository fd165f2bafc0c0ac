"""Laws 2, 7, 8, 9 and 10 under every strategy: DDP, and FSDP2, where W0 and the adapter lie in parts."""

import functools
import json

import pytest
import timm
import torch
import torchvision

from lora_lightning import LoRAConfig, LoRAError, inject
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.lora.inject import adapted_layers
from lora_lightning.training.callbacks.monitors import FILE
from lora_lightning.training.checkpoints.file_io import WholeFiles
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from lora_lightning.training.strategies.fsdp2 import FSDP2Strategy, groups_of, named_blocks, shard
from lora_lightning.training.trainer import LoRATrainer
from tests.command.process import run
from tests.distributed import one_process
from tests.factories import hf
from tests.processes import REPOSITORY
from tests.training import ragged, shards, strategies
from tests.training.ragged import assert_alike, furthest
from tests.training.resuming import at, differing, logged
from tests.training.strategies import CASES, ONE, STRATEGIES, script

# A sharded model, bit for bit.


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    file = tmp_path_factory.mktemp("shards") / "found.json"
    script("run", file, 2, "shards")
    return json.loads(file.read_text())


@pytest.mark.parametrize("case", shards.CASES)
def test_a_sharded_model_is_the_model_in_outputs_gradients_and_fingerprint(beside, case):
    assert [found[case] for found in beside] == [[], []]


def test_texts_of_unlike_length_are_written_by_all_processes_together(beside):
    assert [found["generation"] for found in beside] == [True, True]


def test_what_cannot_be_sharded_is_refused_by_name():
    twice, scalar = shards.attention(), shards.attention().requires_grad_(False)
    twice.blocks[1].q = twice.blocks[0].q
    inject(twice, LoRAConfig(r=2, target_modules=["q"]))
    scalar.temperature.requires_grad_(True)
    for model, options, said in (
        (twice, {}, "blocks.0.q.lora_A, blocks.0.q.lora_B"),
        (scalar, {}, "temperature"),
        (shards.attention(), {"blocks": ["block.*"]}, "fits no module with parameters; did you mean 'blocks.2'"),
    ):
        with one_process() as mesh, pytest.raises(LoRAError, match=said):
            shard(model, mesh, torch.device("cpu"), **options)


# A run's life under each strategy.


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """The folder of all that two processes did, which began with checkpoints of one, and ended in one again."""
    folder = tmp_path_factory.mktemp("life")
    strategies.fit(folder / "alone", max_epochs=2)
    strategies.begin(folder, ONE)
    script("life", folder, 2)
    for source in (ONE, *STRATEGIES):
        strategies.end(folder, source, ONE)
    return folder


@pytest.fixture(params=STRATEGIES)
def found(request, lived):
    """What was found under one strategy, and `folder`, where its fits are."""
    folder = lived / request.param
    return {**torch.load(folder / "found.pt", weights_only=False), "folder": folder, "strategy": request.param}


@functools.cache
def whole(case):
    """One process with all of a step's rows in one batch."""
    return strategies.fit_case(case)


def assert_equal_to_one(folder, strategy, case):
    """Law 9."""
    ours, one = torch.load(folder / f"{strategy} {case}.pt"), whole(case)
    if "to itself" in case:
        assert furthest(ours, one) > 1e-3, "without gathering it is another loss"
    else:
        assert_alike(ours, one, CASES[case].closeness)
        assert "val/loss" in ours["metrics"] or CASES[case].options.get("max_steps") == 6


@pytest.mark.parametrize(("strategy", "case"), strategies.cases(2, slow=False))
def test_two_processes_equal_one_over_ragged_and_accumulated_batches(lived, strategy, case):
    assert_equal_to_one(lived, strategy, case)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_equals_one_on_texts_and_over_a_narrow_base(tmp_path, processes):
    strategies.texts(1)
    script("equality", tmp_path, processes)
    for strategy, case in strategies.cases(processes):
        assert_equal_to_one(tmp_path, strategy, case)


@pytest.mark.parametrize("step", [9, 14])
def test_a_resumed_fit_is_the_uninterrupted_one(found, step):
    assert differing(found["whole"], found[f"from {step}"]) == []


@pytest.mark.parametrize("target", [ONE, *STRATEGIES])
@pytest.mark.parametrize("source", [ONE, *STRATEGIES])
def test_a_checkpoint_of_one_strategy_goes_on_under_the_other_to_the_same_adapter(lived, source, target):
    wanted, ours = (load_checkpoint(at(lived / f"{name} to {to}", 14)) for name, to in ((ONE, ONE), (source, target)))
    assert not list((lived / f"{source} to {target}").rglob("007*")), "the first epoch was not fitted again"
    assert ours["state_dict"].keys() == wanted["state_dict"].keys()
    for key, value in wanted["state_dict"].items():
        assert float((ours["state_dict"][key] - value).abs().max() / value.abs().max()) < 1e-5, key


def test_a_file_is_that_of_a_single_process_and_holds_no_weight_of_the_base(lived, found):
    many, one = load_checkpoint(at(found["folder"] / "file", 14)), load_checkpoint(at(lived / "alone", 14))
    assert many.keys() == one.keys()
    assert [(k, v.shape) for k, v in many["state_dict"].items()] == [(k, v.shape) for k, v in one["state_dict"].items()]
    assert many["lora_lightning"]["base"] == one["lora_lightning"]["base"]
    (ours,), (theirs,) = many["optimizer_states"], one["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    shapes = [{i: {k: v.shape for k, v in own.items()} for i, own in s["state"].items()} for s in (ours, theirs)]
    assert shapes[0] == shapes[1]
    own = adapter_tensors(strategies.dropping().backbone)
    assert {k.removeprefix("backbone.") for k in many["state_dict"]} == own.keys()
    assert {tuple(shape) for shape in found["gathered"]} <= {tuple(t.shape) for t in own.values()}, "W0 was gathered"


def test_one_process_evaluates_as_two_do_and_goes_on(found, tmp_path):
    trainer = strategies.fit(tmp_path / "on", ckpt=at(found["folder"] / "file", 14))
    assert trainer.global_step == found["whole"]["step"] == 21
    alone, many = strategies.figures(trainer, at(found["folder"] / "file", 9)), found["figures"]
    torch.testing.assert_close(many.pop("predicted"), alone.pop("predicted"), rtol=1e-5, atol=1e-5)
    assert many == pytest.approx(alone, rel=1e-5)
    assert {"test/loss", "val/loss", "test/accuracy"} <= many.keys()


def test_a_fit_under_autocast_reports_once_and_a_sharded_one_leaves_the_export_to_the_command(found):
    folder = found["folder"] / "bf16" / "run" / "version_0"
    report = json.loads((folder / "report.json").read_text())
    assert (report["steps"], report["backbone"]) == (2, "Net"), "by its own class, which FSDP2 replaces"
    assert report["w0_unchanged"]
    assert (folder / "export").exists() == (found["strategy"] == "ddp")
    layers = [name for name, _ in adapted_layers(ragged.module(torch.float32, bias="lora_only").backbone)]
    rows = logged(found["folder"] / "bf16", FILE)
    assert [(int(row["step"]), row["layer"]) for row in rows] == [(step, name) for step in (1, 2) for name in layers]


STOPS = {
    "w0": "W0MovedError: W0 moved during fit: 1 frozen tensors changed, first 'layers.1.up.weight'",
    "loss": "NotFiniteError: the loss of optimizer step 5 is not finite",
}


@pytest.mark.parametrize("what", STOPS)
def test_what_goes_wrong_in_one_process_stops_all(found, what):
    """A write into its part of W0 (law 2), and a loss that is not finite."""
    assert [said.startswith(STOPS[what]) for said in found[f"stopped by {what}"]] == [True, True]


MISFITS = {
    "another base": "layers.2.down.bias",
    "shapes": "lora_A' has shape (3, 17), expected (2, 17)",
    "keys": "left over 'backbone.layers.0.down.lora_A'",
}


def test_checkpoints_that_do_not_fit_are_refused_in_all_processes(found):
    assert found["misfits"].keys() == MISFITS.keys()
    for name, said in found["misfits"].items():
        assert [MISFITS[name] in one for one in said] == [True, True], (name, said)


# What FSDP2 finds and says.


def test_blocks_are_found_without_knowing_the_architecture():
    bert = hf("BertModel", hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
    gpt2 = hf("GPT2Model", n_embd=8, n_layer=2, n_head=2, vocab_size=9)
    with torch.device("meta"):
        vit, resnet = timm.create_model("vit_tiny_patch16_224"), torchvision.models.resnet18()
        swin = torchvision.models.swin_t()
    assert list(groups_of(bert)) == [f"encoder.layer.{i}" for i in range(3)]
    assert list(groups_of(gpt2)) == ["h.0", "h.1"]
    assert list(groups_of(vit)) == [f"blocks.{i}" for i in range(12)]
    assert list(groups_of(resnet)) == [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    assert [name.count(".") for name in groups_of(swin)].count(2) == 12
    assert list(groups_of(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)))) == []
    attentions = [f"encoder.layer.{i}.attention" for i in range(3)]
    assert list(named_blocks(bert, ["encoder.layer.*.attention", "pooler"])) == [*attentions, "pooler"]


def test_a_word_is_enough_for_the_defaults():
    trainer = LoRATrainer(strategy="fsdp2", accelerator="cpu", devices=2, logger=False)
    assert (type(trainer.strategy), type(trainer.strategy.checkpoint_io)) == (FSDP2Strategy, WholeFiles)


@pytest.mark.slow
def test_the_command_fits_tests_predicts_and_exports(tiny, tmp_path):
    both = ["--config", tiny.config, "--config", REPOSITORY / "configs" / "strategy" / "fsdp2.yaml"]
    run("fit", *both, "--trainer.max_epochs", "2", cwd=tmp_path)
    for command, *more in (["test"], ["predict", "--trainer.devices", "1"], ["export"]):
        run(command, "--ckpt_path", "runs/tiny", *more, cwd=tmp_path)
    folder = tmp_path / "runs" / "tiny" / "version_0"
    report = json.loads((folder / "report.json").read_text())
    assert report["w0_unchanged"]
    assert report["export_max_rel_diff"] < 1e-5
    assert {"test_accuracy", "val_accuracy"} <= report.keys()
    assert next(folder.rglob("predictions.jsonl")).read_text().count("\n") > 10
