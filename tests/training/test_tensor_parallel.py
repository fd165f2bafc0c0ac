"""Tensor parallelism: laws 1, 2, 7, 8 and 9 where layers are split within themselves.

Mutations that were made once, and what then fails:

| mutation | test |
|---|---|
| gradients of A, or of B, are taken for whole | test_a_split_model_is_the_model... |
| every process adds a rowwise layer's biases | the same |
| no sum over a colwise layer's input gradients | the same |
| each process draws its own mask in a rowwise layer | the same, "dropout" |
| what is gathered of a split layer counts as lying in parts | test_a_loss_past_the_backbones_call_is_refused |
| random states are not shared, metrics are counted in all processes | test_a_group_draws_one_number... |
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from lora_lightning import LoRAConfig, LoRAError, LoRAModule, inject
from lora_lightning.lora.frozen.fingerprint import fingerprint
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.tasks.contrastive import ContrastiveEmbedding
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from lora_lightning.training.strategies.fsdp2 import FSDP2Strategy
from lora_lightning.training.tensor_plan import plan_of
from lora_lightning.training.tensor_refusals import refuse, refuse_run
from tests.chats import make_llama, write_chats
from tests.command.process import run
from tests.processes import REPOSITORY
from tests.tiny_lm import make_model
from tests.training import sharded, split
from tests.training.resuming import differing


def script(name, folder, processes, timeout=300):
    command = [sys.executable, "-m", "tests.training.split", name, str(folder), str(processes)]
    env = os.environ | {"LIMIT": str(timeout)}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A folder of what two processes found."""
    folder = tmp_path_factory.mktemp("split")
    make_model("llama", vocab_size=split.VOCABULARY).save_pretrained(folder / "base")
    script("quick", folder, 2)
    return folder


def begun(folder):
    sharded.fit(folder / "alone", made=split.trained)
    shutil.copyfile(sharded.at(folder / "alone", 14), folder / "one.ckpt")


def test_a_loss_past_the_backbones_call_is_refused(found):
    """A trained head alone: its chunks are no call of the backbone, and FSDP2 would add up no gradient of it."""
    assert "FSDP2 saw no backward of backbone.lm_head.lora_A" in torch.load(found / "past.pt")


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
    assert all(torch.load(folder / "alike.pt"))  # what every process of a group holds whole, to the bit


def test_two_processes_equal_one(found):
    assert_equal_to_one(found, split.QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_family_in_one_group_and_in_two_equals_one_process(tmp_path, processes):
    script("equality", tmp_path, processes)
    # Two groups with batches of their own draw other masks than one process with the batches of both.
    drops = () if processes == 2 else ("dropout", "recomputed")
    assert_equal_to_one(tmp_path, [name for name in split.FITS if name not in drops])


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
def life(tmp_path_factory):
    """A folder of the runs of two processes; one began with a checkpoint of one process."""
    folder = tmp_path_factory.mktemp("life")
    begun(folder)
    script("life", folder, 2)
    return folder


@pytest.fixture(scope="module")
def lived(life):
    return torch.load(life / "found.pt", weights_only=False)


@pytest.mark.slow
def test_a_resumed_fit_is_the_uninterrupted_one_in_both_forms(life):
    assert_lived(life)


@pytest.mark.slow
def test_a_run_of_two_groups_lives(tmp_path):
    begun(tmp_path)
    script("life", tmp_path, 4, timeout=900)
    assert_lived(tmp_path)


@pytest.mark.slow
def test_a_file_is_that_of_a_single_process_and_holds_no_weight_of_the_base(life):
    many, one = load_checkpoint(sharded.at(life / "file", 14)), load_checkpoint(life / "one.ckpt")
    assert many.keys() == one.keys()
    assert {k: v.shape for k, v in many["state_dict"].items()} == {k: v.shape for k, v in one["state_dict"].items()}
    assert list(many["state_dict"]) == list(one["state_dict"])
    assert many["lora_lightning"]["base"] == one["lora_lightning"]["base"]
    (ours,), (theirs,) = many["optimizer_states"], one["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    shapes = [{i: {k: v.shape for k, v in own.items()} for i, own in s["state"].items()} for s in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert {k.removeprefix("backbone.") for k in many["state_dict"]} == adapter_tensors(split.trained().backbone).keys()


@pytest.mark.slow
def test_a_folder_read_by_one_process_is_the_file(life):
    parts, file = (load_checkpoint(sharded.at(life / form, 9)) for form in ("folder", "file"))
    assert differing(parts["state_dict"], file["state_dict"]) == []
    for i, own in file["optimizer_states"][0]["state"].items():
        assert differing(parts["optimizer_states"][0]["state"][i], own) == []


@pytest.mark.slow
@pytest.mark.parametrize("form", ["file", "folder"])
def test_one_process_goes_on_evaluates_and_predicts_as_the_group_did(life, lived, form, tmp_path):
    trainer = sharded.fit(tmp_path, made=split.trained, ckpt=sharded.at(life / form, 14))
    assert trainer.global_step == 21
    alone, many = split.figures(trainer, sharded.at(life / form, 9)), dict(lived[f"{form} figures"])
    torch.testing.assert_close(many.pop("predicted"), alone.pop("predicted"), rtol=1e-5, atol=1e-5)
    assert many == pytest.approx(alone, rel=1e-5)
    assert {"test/loss", "val/loss", "test/accuracy"} <= many.keys()


@pytest.mark.slow
def test_a_write_into_one_part_of_the_base_and_a_bad_loss_stop_all(lived):
    moved = "W0MovedError: W0 moved during fit: 1 frozen tensors changed, first 'layers.1.up.weight'"
    bad = "NotFiniteError: the loss of optimizer step 5 is not finite"
    assert [said.startswith(moved) for said in lived["stopped by w0"]] == [True, True]
    assert [said.startswith(bad) for said in lived["stopped by loss"]] == [True, True]


def test_a_base_is_filled_from_files_after_it_was_split(found):
    (meta, ours), (loaded, theirs), _ = torch.load(found / "from files.pt")
    assert meta == loaded == fingerprint(make_model("llama", vocab_size=split.VOCABULARY)).digest
    assert differing(ours, theirs) == []


def test_a_group_draws_one_number_and_counts_a_batch_once(found):
    *_, told = torch.load(found / "from files.pt")
    assert told["drawn"][0] == told["drawn"][1]
    assert told["units"] == 3


@pytest.mark.slow
def test_a_fit_under_autocast_reports_and_measures_its_ranks(life):
    folder = life / "bf16" / "run" / "version_0"
    report = json.loads((folder / "report.json").read_text())
    assert (report["steps"], report["w0_unchanged"]) == (2, True)
    rows = (folder / "rank.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in rows[1:]] == ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]


@pytest.mark.slow
def test_each_prediction_is_written_once(life):
    lines = (life / "file" / "run" / "version_0" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(13))


# What is said.


def model_of(**config):
    model = split.language_model("llama", torch.float32)
    inject(model, LoRAConfig(**{"r": 2} | config))
    return model


def said(model, own=None, count=2):
    with pytest.raises(LoRAError) as refused:
        refuse(model, plan_of(model, own), count)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA's norms of 'model.layers.0.self_attn.q_proj'"),
        ({"init": "pissa"}, "lora.init=pissa of 'model.layers.0.self_attn.q_proj' keeps its start"),
        ({"slices": {"q_proj": {"of": ["a", "b"], "take": ["a"]}}}, "the chosen parts of 'model.layers.0.self_attn.q"),
        (
            {"modules_to_save": ["model.layers.0.mlp.down_proj"], "target_modules": ["q_proj"]},
            "'model.layers.0.mlp.down_proj' is a copy of modules_to_save",
        ),
        ({"target_modules": ["embed_tokens"]}, "'model.embed_tokens' trains, and is no linear layer"),
        (
            {"target_modules": ["q_proj"], "target_parameters": ["layers.0.mlp.up_proj.weight"]},
            "'model.layers.0.mlp.up_proj",
        ),
    ],
)
def test_options_without_a_split_form_are_refused_by_name(config, words):
    assert words in said(model_of(**config))


def test_norms_of_heads_do_not_train():
    model = split.language_model("qwen3", torch.float32)
    name = "model.layers.0.self_attn.q_norm"
    inject(model, LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=[name]))
    assert f"'{name}.lora_copy' trains, and each process calls it with its own heads" in said(model)


def test_sizes_that_cannot_be_split_are_refused():
    model = model_of()
    assert "num_key_value_heads=2 of LlamaForCausalLM is no multiple of tensor_parallel_size=4" in said(model, count=4)
    assert "the 16 outputs of 'model.layers.0.self_attn.q_proj' cannot be split over 3" in said(model, count=3)
    tied = split.language_model("llama", torch.float32)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    assert "'lm_head' shares a tensor" in said(tied, {"lm_head": "colwise_rep"})


def test_a_plan_is_the_models_with_ones_own_over_it():
    model = model_of()
    styles = plan_of(model, None).styles
    assert len(styles) == 14
    assert "lm_head" not in styles
    assert styles["model.layers.1.mlp.up_proj"].by_output
    assert not styles["model.layers.1.mlp.down_proj"].by_output
    own = plan_of(model, {"*.mlp.*_proj": "replicate", "lm_head": "colwise_gather_output"}).styles
    assert own.keys() == {name for name in styles if "self_attn" in name} | {"lm_head"}


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (None, "Net has none: give FSDP2Strategy.tensor_parallel_plan, such as {'*.q_proj': colwise"),
        ({"*.upp": "colwise"}, "'*.upp' fits no module"),
        ({"*.up": "columnwise"}, "'columnwise' of '*.up' is no style; did you mean 'colwise'"),
        ({"*.up": "replicate"}, "tensor parallelism would split nothing"),
        ({"norm": "colwise"}, "'norm' is LayerNorm, and only linear layers are split"),
    ],
)
def test_a_model_without_a_plan_needs_one_that_fits(own, words):
    model = split.Net()
    with pytest.raises(LoRAError, match=re.escape(words)):
        refuse(model, plan_of(model, own), 2)


def test_a_style_of_the_models_plan_that_is_not_supported_is_named():
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    mixtral = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2))
    with pytest.raises(LoRAError, match=r"is not supported, which the plan has for model\.layers\.0\.mlp\.experts"):
        plan_of(mixtral, None)
    assert len(plan_of(mixtral, {"*.experts*": "replicate"}).styles) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1"),
        ({"tensor_parallel_plan": split.PLAN}, "give tensor_parallel_size too"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(options, words):
    with pytest.raises(LoRAError, match=words):
        FSDP2Strategy(**options)


@pytest.mark.parametrize("options", [{"compile": True}, {"cpu_offload": True}, {"task": ContrastiveEmbedding()}])
def test_a_run_that_asks_for_what_is_not_there_is_refused_by_name(options):
    offload, task = options.pop("cpu_offload", False), options.pop("task", split.Told())
    module = LoRAModule(split.Net(), task, LoRAConfig(r=2), **options)
    with pytest.raises(LoRAError, match=r"tensor parallelism does not go with .*(compile|cpu_offload|candidates)"):
        refuse_run(module, split.strategy(cpu_offload=offload))


# The command.

RUN = """
name: tp
seed_everything: 7
trainer: {{max_epochs: 2, accelerator: cpu, enable_progress_bar: false}}
model:
  backbone: {{class_path: lora_lightning.huggingface, init_args: {{pretrained_model_name_or_path: {model},
    auto_class: AutoModelForCausalLM}}}}
  lora: {{r: 4, dropout: 0.1}}
  task: {{class_path: lora_lightning.CausalLM}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01}}}}
data:
  class_path: lora_lightning.ChatData
  init_args: {{path: {chats}, tokenizer: {model}, batch_size: 4, split: {{validation: 0.2, test: 0.2}}}}
"""


@pytest.mark.slow
def test_the_command_fits_goes_on_tests_predicts_and_exports(tmp_path):
    model, chats = make_llama(tmp_path / "model"), write_chats(tmp_path / "chats.jsonl", rows=40)
    (tmp_path / "run.yaml").write_text(RUN.format(model=model, chats=chats))
    both = ["--config", "run.yaml", "--config", REPOSITORY / "configs" / "strategy" / "fsdp2-tp.yaml"]
    run("fit", *both, "--trainer.max_epochs", "1", cwd=tmp_path, timeout=600)
    run("fit", *both, "--ckpt_path", "last", cwd=tmp_path, timeout=600)
    run("test", "--ckpt_path", "runs/tp", cwd=tmp_path, timeout=600)
    run("export", "--ckpt_path", "runs/tp", cwd=tmp_path, timeout=600)
    folder = max((tmp_path / "runs" / "tp").glob("version_*"))
    report = json.loads((folder / "report.json").read_text())
    assert report["w0_unchanged"]
    assert report["export_max_rel_diff"] < 1e-5
    refused = run("fit", *both, "--model.lora.use_dora", "true", cwd=tmp_path, ok=False)
    assert "tensor parallelism: DoRA's norms of 'model.layers.0.self_attn.q_proj'" in refused.stderr + refused.stdout
