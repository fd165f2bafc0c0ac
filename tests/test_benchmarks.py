"""What the benchmarks compute and compare is what they say."""

import argparse
import json
import subprocess
import sys
import zipfile

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks import memory
from benchmarks.checkpoint_sizes import QUERY_VALUE, computed, llama_7b, roberta, written
from lora_lightning import LoRAConfig, inject
from lora_lightning.lora.frozen.tensors import adapter_tensors
from lora_lightning.training.checkpoints.run_folder import load_checkpoint
from tests.command.process import REPOSITORY


def bytes_in(value):
    """Of every tensor in nested mappings and sequences."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(bytes_in(part) for part in parts)


@pytest.mark.parametrize("options", [{}, {"use_dora": True, "modules_to_save": ["classifier"]}], ids=["plain", "more"])
def test_the_sizes_computed_are_those_of_the_files_but_for_headers(options, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=40))
    rows = [{"input_ids": torch.arange(5, 15), "labels": torch.tensor(i)} for i in (0, 1)]
    config = LoRAConfig(r=4, target_modules=["query", "value"], **options)
    files, formula = written(model, config, rows, tmp_path), computed(model)
    for name, file in {"adapter": "adapter/adapter_model.safetensors", "w0": "w0.safetensors"}.items():
        header = int.from_bytes((tmp_path / file).read_bytes()[:8], "little")
        assert files[name] == 8 + header + formula[name]
    content = load_checkpoint(tmp_path / "last.ckpt")
    tensors = {name: bytes_in(content[name]) for name in ("state_dict", "optimizer_states")}
    assert sum(tensors.values()) == formula["checkpoint"]
    with zipfile.ZipFile(tmp_path / "last.ckpt") as archive:
        records = [entry.file_size for entry in archive.infolist() if "/data/" in entry.filename]
    others = bytes_in({key: value for key, value in content.items() if key not in tensors})  # random states
    assert sum(records) == formula["checkpoint"] + others
    # Of what full fine-tuning writes, on the same model.
    torch.manual_seed(0)
    full = BertForSequenceClassification(BertConfig(**sizes, vocab_size=40))
    optimizer = torch.optim.AdamW(full.parameters())
    full(**{k: torch.stack([row[k] for row in rows]) for k in rows[0]}).loss.backward()
    optimizer.step()
    replaced = bytes_in(dict(full.classifier.state_dict())) * 3 + 8 if options else 0  # the adapter brings those
    assert bytes_in([full.state_dict(), optimizer.state_dict()]) == formula["full_checkpoint"] + replaced


def test_the_models_are_those_that_they_are_called():
    with torch.device("meta"):
        base = roberta()
    inject(base, LoRAConfig(r=8, target_modules=QUERY_VALUE["roberta-base"]), run_init=False)
    assert sum(t.numel() for t in adapter_tensors(base).values()) == 294_912  # the paper's 0.3M
    assert sum(p.numel() for p in llama_7b().parameters()) == 6_738_415_616


@pytest.mark.slow
def test_all_ways_of_the_memory_benchmark_do_the_same_work():
    options = argparse.Namespace(quick=True, rows=1, tokens=64, steps=2)
    found = {way: memory.one(way, options) for way in memory.WAYS}
    ours, again, peft = found.values()
    assert ours["losses"] == again["losses"]
    assert peft["losses"] == pytest.approx(ours["losses"], abs=2e-3)
    assert {tuple(row["dtypes"]) for row in found.values()} == {("False: torch.bfloat16", "True: torch.float32")}
    assert len({(row["parameters"], row["trainable"]) for row in found.values()}) == 1
    assert again["kept for backward, MB"] < ours["kept for backward, MB"] < peft["kept for backward, MB"]
    assert memory.table(found).count("\n") == len(found)


def test_the_routes_of_a_batch_a_save_and_a_resume_are_as_long_as_the_docs_say():
    """In a process of its own, in which no other test has filled a cache or wrapped a function."""
    program = (
        "import json; from benchmarks.routes import count_routes;"
        " print(json.dumps({route: len(files) for route, files in count_routes().items()}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    counts = json.loads(done.stdout.splitlines()[-1])
    said = (REPOSITORY / "CONTRIBUTING.md").read_text()
    batch, save, resume = counts["batch"], counts["save"], counts["resume"]
    assert f"{batch} files of the package, a save of {save} and a resume of {resume}" in said
