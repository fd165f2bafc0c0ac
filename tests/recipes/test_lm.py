"""A language model on a 4-bit base through fit and export; and a part of a hub's set."""

import datasets
import pytest
import torch
import transformers

from lora_lightning.cli.main import LoRACLI
from lora_lightning.data.io import tables
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.frozen.quantization import scheme
from tests.recipes.recipe import run_a_step
from tests.recipes.test_steps import chat_files, chats


@pytest.mark.slow
def test_a_fit_on_a_4_bit_base_is_exported(tmp_path):
    pytest.importorskip("bitsandbytes")
    model, data = "llama-3.1-8b", "own-jsonl"
    given = chats(model, data)(tmp_path)
    short = ["--trainer.fast_dev_run", "false", "--trainer.max_steps", "2", "--trainer.max_epochs", "-1"]
    given["args"] = [*given["args"], *short, "--trainer.precision", "nf4-base", "--runs_dir", str(tmp_path / "runs")]
    cli = run_a_step(chat_files(model, data, "lm/qlora.yaml"), tmp_path, **given)
    layer = cli.model.backbone.model.layers[0].mlp.up_proj
    assert "4-bit" in str(scheme(layer))
    assert (tmp_path / "runs/lm/version_0/samples.jsonl").is_file()
    LoRACLI(args=["export", "--ckpt_path", str(tmp_path / "runs/lm"), "--output_dir", str(tmp_path / "out")])
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_a_part_of_a_hub_set_stands_for_a_file(tmp_path, monkeypatch):
    """`datasets` takes a directory for a set of the hub."""
    datasets.Dataset.from_dict({"a": [1, 2, 3, 4]}).to_json(tmp_path / "train.jsonl")
    found = tables.read_tables({"train": f"{tmp_path}@train[:3]", "validation": f"{tmp_path}@train[3:]"})
    assert {split: table["a"][:] for split, table in found.items()} == {"train": [1, 2, 3], "validation": [4]}
    with pytest.raises(LoRAError, match="no part 'tset' of a set"):
        tables.read_tables({"train": f"{tmp_path}@tset"})
