"""What the benchmarks compute and compare is what they say."""

import importlib.metadata
import json
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.checkpoint_sizes import computed, written
from benchmarks.silent_failures.__main__ import VERSIONS
from benchmarks.silent_failures.harness import WAYS, cell, failures, judge, link
from lora_lightning import LoRAConfig
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


# ---- docs/silent-failures.md holds what benchmarks/silent_failures prints


PAGE = (REPOSITORY / "docs" / "silent-failures.md").read_text(encoding="utf-8")
ROWS = {
    row[0]: row[1:] for row in re.findall(r"^\| `(\w+)`: (.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", PAGE, re.M)
}
SAME_VERSIONS = all(f"{name} {importlib.metadata.version(name)}" in PAGE for name in VERSIONS)


def test_the_page_lists_the_programs_with_their_threads_and_counts_its_rows():
    assert {name: (m.TITLE, link(m.THREAD)) for name, m in failures().items()} == {n: r[:2] for n, r in ROWS.items()}
    assert len(ROWS) >= 20
    for name, module in failures().items():
        place, _, number = module.THREAD.partition("#")
        assert re.search(rf"`{name}`", PAGE.partition("## What is adapted")[2]), name
        assert re.search(rf"https://github.com/{place}/(issues|pull)/{number}\)", PAGE), name
    for kind in ("right", "refused", "warned", "silently wrong"):
        counted = re.search(rf"^\| {kind} \| \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.M)
        cells = zip(*[row[2:] for row in ROWS.values()], strict=True)
        assert [int(n) for n in counted.groups()] == [sum(c.strip("*").startswith(kind) for c in way) for way in cells]


@pytest.mark.parametrize("name", ["misspelt_target", "dropout_in_eval", "nan_adapter"])
def test_a_quick_one_comes_out_as_the_page_says(name):
    module = failures()[name]
    for way, said in zip(WAYS, ROWS[name][2:], strict=True):
        if way == "ours" or SAME_VERSIONS:  # others may mend theirs
            assert cell(judge(getattr(module, way), module.WARNS)) == said
