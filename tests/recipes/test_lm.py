"""Today's recipes for language models: each combination is parsed, and runs for a step on a model of its kind."""

import json
from itertools import product

import datasets
import pytest
import torch
import transformers
import yaml

from lora_lightning.cli.build import parse_run
from lora_lightning.cli.main import LoRACLI
from lora_lightning.data.io import tables
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.frozen.quantization import scheme
from lora_lightning.tasks.language_model import CausalLM
from tests.chats import CHATML, GEMMA, LLAMA3, MISTRAL, assistant, make_tokenizer, user
from tests.command.process import REPOSITORY

LM = REPOSITORY / "configs" / "lm"
MODELS = sorted(file.stem for file in (LM / "models").glob("*.yaml"))
SETS = sorted(file.stem for file in (LM / "data").glob("*.yaml"))

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
}
KINDS = {
    "llama-3.2-1b": ("LlamaConfig", {"tie_word_embeddings": True}, LLAMA3),
    "llama-3.1-8b": ("LlamaConfig", {}, LLAMA3),
    "qwen3-4b": ("Qwen3Config", {"tie_word_embeddings": True}, CHATML),
    "gemma-3-1b": ("Gemma3TextConfig", {"sliding_window": 16}, GEMMA),
    "mistral-7b": ("MistralConfig", {"sliding_window": None}, MISTRAL),
}
"""Of each model its architecture, and the kind of chat template that it has."""

ROWS = {
    "dolly": {"instruction": "Say sky.", "context": "Skies.", "response": "sky", "category": "open_qa"},
    "alpaca": {"instruction": "Say sky.", "input": "", "output": "sky"},
    "ultrachat": {"prompt": "Say.", "prompt_id": "1", "messages": [user("Say sky."), assistant("sky")] * 2},
    "own-jsonl": {"messages": [user("Say sky."), assistant("sky")]},
}
"""A row of each set, with its columns."""


def files(model, data, *more):
    names = ["base.yaml", f"models/{model}.yaml", f"data/{data}.yaml", *more]
    return [part for name in names for part in ("--config", str(LM / name))]


def make_tiny(folder, name):
    """A recipe's model in `folder`: its architecture, tiny, with random weights, and a tokenizer."""
    kind, options, template = KINDS[name]
    tokenizer = make_tokenizer(template)
    numbers = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    config = getattr(transformers, kind)(vocab_size=len(tokenizer), **TINY, **options, **numbers)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    """A directory for each recipe's model."""
    folder = tmp_path_factory.mktemp("models")
    for name in KINDS:
        make_tiny(folder / name, name)
    return folder


def tiny_set(folder, data):
    """The set's path in the recipe's own form, over a file of a hundred such rows."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(ROWS[data]) + "\n" for _ in range(100)))
    given = yaml.safe_load((LM / "data" / f"{data}.yaml").read_text())["data"]["init_args"]["path"]
    return {split: str(file) for split in given} if isinstance(given, dict) else str(file)


def run(command, tiny_models, folder, model, data, *args, more=()):
    overlay = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "val_check_interval": 1.0},
        "model": {"backbone": {"init_args": {"pretrained_model_name_or_path": str(tiny_models / model)}}},
        "data": {
            "init_args": {
                "path": tiny_set(folder, data),
                "tokenizer": str(tiny_models / model),
                "num_workers": 0,
                "max_length": 256,
            }
        },
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(overlay))
    return LoRACLI(args=[command, *files(model, data, *more), "--config", str(file), *args])


@pytest.mark.parametrize("overlay", [(), ("qlora.yaml",)], ids=["16-bit", "qlora"])
@pytest.mark.parametrize(("model", "data"), list(product(MODELS, SETS)))
def test_every_combination_is_parsed(model, data, overlay):
    config = parse_run(["fit", *files(model, data, *overlay)])
    name = config.model.backbone.init_args.pretrained_model_name_or_path
    assert config.data.init_args.tokenizer == name
    assert config.model.lora.alpha == 2 * config.model.lora.r == 32
    assert config.model.lora.target_modules == "all-linear"
    assert config.data.init_args.path
    assert config.trainer.precision == ("nf4-base" if overlay else "bf16-base")


@pytest.mark.parametrize("file", sorted(LM.rglob("*.yaml")), ids=lambda file: file.stem)
def test_each_file_says_in_its_head_what_it_is(file):
    text = file.read_text()
    starts = {"models": "# Model: ", "data": "# Set: "}.get(file.parent.name, "# ")
    assert text.startswith(starts)
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert {"models": "icence", "data": "\n# "}.get(file.parent.name, "arXiv") in head


@pytest.mark.parametrize(
    ("model", "data"), [*((model, "own-jsonl") for model in MODELS), *(("llama-3.2-1b", s) for s in SETS)]
)
def test_a_step_of_each_model_and_of_each_set(model, data, tiny_models, tmp_path):
    cli = run("fit", tiny_models, tmp_path, model, data, "--trainer.fast_dev_run", "1")
    assert isinstance(cli.model.task, CausalLM)
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    (row, *_) = cli.datamodule.encoded_rows("train")
    assert row["position_ids"].count(0) > 1  # packed
    assert {p.dtype for n, p in cli.model.backbone.named_parameters() if ".lora_" not in n} == {torch.bfloat16}
    adapted = {row.module.rpartition(".")[2] for row in cli.model.report.modules}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.slow
def test_a_fit_on_a_4_bit_base_is_exported(tiny_models, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = "llama-3.1-8b"
    short = ("--trainer.max_steps", "2", "--trainer.max_epochs", "-1", "--runs_dir", str(tmp_path / "runs"))
    cli = run("fit", tiny_models, tmp_path, model, "own-jsonl", *short, more=("qlora.yaml",))
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
