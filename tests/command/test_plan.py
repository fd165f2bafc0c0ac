"""`lora-lightning plan` on a config that `fit` takes: what it says is what the fit then has."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import yaml

from lora_lightning.cli.main import LoRACLI
from lora_lightning.cli.parser import command_parser, run_command
from lora_lightning.commands.plan.command import make_plan

OWN = ["--precisions", "[]", "--trainer.precision", "32-true"]
"""One row of memory, for time."""


def planned(*arguments: str):
    given = command_parser("plan").parse_args(list(map(str, arguments))).as_dict()
    fit, _ = given.pop("fit"), given.pop("json")
    return make_plan(fit, **given)


def test_counts_and_files_are_those_of_the_fit(tiny, trained):
    plan = planned("-c", tiny.config, "--length", 12, *OWN)
    report = json.loads((trained / "report.json").read_text())
    assert (report["trainable"], report["total"]) == (plan.report.trainable, plan.report.total)
    LoRACLI(args=["export", "--config", tiny.config, "--ckpt_path", str(trained), "--formats", "adapter"])
    (file,) = trained.rglob("adapter_model.safetensors")
    assert file.stat().st_size == plan.bytes["adapter_file"]


@pytest.fixture
def bare(tiny, tmp_path):
    """The tiny run's config over a directory that holds config.json alone, and data that are nowhere."""
    (tmp_path / "bert").mkdir()
    shutil.copy(Path(tiny.bert) / "config.json", tmp_path / "bert")
    config = yaml.safe_load(Path(tiny.config).read_text())
    config["model"]["backbone"]["init_args"]["pretrained_model_name_or_path"] = str(tmp_path / "bert")
    config["data"]["init_args"] |= {"path": "nowhere.csv", "tokenizer": "nowhere"}
    file = tmp_path / "bare.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def test_config_json_alone_suffices_and_flags_of_fit_count_and_batches_are_as_large_as_asked(bare):
    plan = planned("-c", bare, "--length", 12, *OWN)
    assert plan.report.trainable > 0
    assert plan.config_row().cost.peak > plan.config_row().cost.kept > 0
    assert plan.full_fine_tuning.flops > plan.config_row().cost.flops
    wider = planned("-c", bare, *OWN, "--length", 24, "--model.lora.r", 8)
    assert wider.report.trainable - 66 == 2 * (plan.report.trainable - 66)  # but for the classifier
    assert wider.config_row().cost.kept > 1.9 * plan.config_row().cost.kept
    fewer = planned("-c", bare, *OWN, "--length", 12, "--batch_size", 4, "--trainer.devices", "0,1,2")
    assert (fewer.batch.rows, fewer.processes, plan.batch.rows) == (4, 3, 16)  # 16 are the config's own


def test_labels_come_from_the_config_then_a_flag_then_are_assumed_aloud(bare):
    assumed = planned("-c", bare, *OWN, "--length", 12)
    assert "2 labels are assumed" in assumed.notes[0]
    given = planned("-c", bare, *OWN, "--length", 12, "--num_labels", 5)
    named = planned("-c", bare, *OWN, "--length", 12, "--data.init_args.label_names", "[a, b, c, d, e]")
    assert given.notes == named.notes == []
    assert given.report.saved == named.report.saved == {"classifier": 5 * 32 + 5}
    assert assumed.report.saved == {"classifier": 2 * 32 + 2}


def test_every_overlay_is_set_beside_the_others(bare):
    plan = planned("-c", bare, "--length", 12, "--processes", 4)
    rows = {(row.precision, row.activation_checkpointing): row for row in plan.memory}
    assert len(rows) == 10
    one, half, nf4 = (rows[name, False] for name in ("float32", "bf16-base", "nf4-base"))
    assert half.w0 == pytest.approx(one.w0 / 2, rel=0.02)
    assert nf4.w0 < half.w0
    assert half.adapter == one.adapter
    assert nf4.fsdp2_peak is None
    for row in plan.memory:
        assert row.ddp_peak == row.cost.peak + row.cost.gradients
    assert rows["float32", True].cost.kept < one.cost.kept
    assert rows["16-mixed", False].cost == rows["bf16-mixed", False].cost


def test_the_screen_shows_the_formula_with_the_runs_numbers_and_json_stands_alone(bare, capsys, monkeypatch, tmp_path):
    run_command("plan", ["-c", str(bare), "--length", "12", "--json", *OWN])
    found = json.loads(capsys.readouterr().out)
    assert found["trainable"] == sum(found["saved"].values()) + sum(t["factors"] for t in found["formula"])
    assert found["flops"]["step"] == found["flops"]["forward"] + found["flops"]["backward"]
    monkeypatch.setenv("COLUMNS", "100")
    run_command("plan", ["-c", str(bare), "--length", "12", "--json", str(tmp_path / "plan.json"), *OWN])
    shown = capsys.readouterr().out
    assert "|Theta| = 2 L d_model r" in shown
    assert "2 L d r = 2 x 2 x 32 x 4" in shown
    assert "L (k + m) r = 2 x (32 + 64) x 4" in shown
    assert "FSDP2 of 2" in shown
    assert json.loads((tmp_path / "plan.json").read_text())["batch"]["rows"] == 16


def test_a_step_that_asks_for_numbers_leaves_the_counts(bare):
    config = yaml.safe_load(bare.read_text())
    config["model"]["backbone"] = {"class_path": "tests.command.own_data.Asking"}
    config["model"]["lora"]["target_modules"] = ["query"]
    bare.write_text(yaml.safe_dump(config))
    plan = planned("-c", bare, *OWN, "--data.init_args.max_length", "null")
    assert (plan.report.trainable, plan.memory) == (2 * 8 * 4 + 18, [])
    assert "texts of 512 tokens are assumed" in plan.notes[-2]
    assert "cannot be run without numbers (aten._local" in plan.notes[-1]


@pytest.mark.parametrize("make", ["timm_model", "torchvision_model"])
def test_image_models_are_built_without_their_weights(make, tmp_path):
    pytest.importorskip("timm")
    file = tmp_path / "images.yaml"
    text = f"""
model:
  backbone: {{class_path: lora_lightning.{make}, init_args: {{model_name: resnet18}}}}
  lora: {{r: 4, target_modules: [conv1], modules_to_save: [fc]}}
  task: {{class_path: lora_lightning.ImageClassification}}
data:
  class_path: lora_lightning.ImageData
  init_args: {{path: nowhere, image_size: 32, batch_size: 2}}
"""
    file.write_text(text)
    plan = planned("-c", file, *OWN, "--num_labels", 7)
    assert plan.report.saved == {"fc": 7 * 512 + 7}
    assert plan.batch.image == (3, 32, 32)
    assert plan.config_row().cost.kept > 0


@pytest.mark.slow
def test_seven_billion_parameters_are_planned_in_a_minute(tmp_path):
    (tmp_path / "llama").mkdir()
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    (tmp_path / "llama" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 32000, **shape}))
    file = tmp_path / "llama.yaml"
    file.write_text(f"""
model:
  backbone:
    class_path: lora_lightning.huggingface
    init_args: {{pretrained_model_name_or_path: {tmp_path / "llama"}, auto_class: AutoModelForCausalLM}}
  lora: {{r: 8, target_modules: all-linear}}
  task: {{class_path: lora_lightning.CausalLM}}
data:
  class_path: lora_lightning.LanguageModellingData
  init_args: {{path: nowhere.txt, tokenizer: nowhere, max_length: 2048, batch_size: 1, packing: false}}
""")
    start = time.process_time()
    plan = planned("-c", file)
    assert time.process_time() - start < 60
    assert plan.report.trainable == 19_988_480
    assert plan.config_row().cost.forward == pytest.approx(2 * 6.6e9 * 2048, rel=0.15)
