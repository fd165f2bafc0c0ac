"""The paper's GPT-2 recipes: every stack is parsed with the paper's numbers, and runs a step on a tiny GPT-2."""

import json

import pytest
from transformers import GPT2Config, GPT2Tokenizer

from tests.lora.test_paper_counts import OF_C_ATTN
from tests.recipes.recipe import parse, rows_file, run_a_step
from tests.tiny_text import restaurants

SETS, SIZES = ["e2e", "webnlg", "dart"], ["medium", "large"]
# Table 11: weight decay, dropout, label smoothing, length penalty.
TABLE_11 = {"e2e": (0.01, 0.1, 0.1, 0.9), "webnlg": (0.01, 0.1, 0.1, 0.8), "dart": (0.0, 0.0, 0.0, 0.8)}
END = "<|endoftext|>"


def stack(of, size):
    return ["gpt2/base.yaml", f"gpt2/{of}.yaml", f"gpt2/{size}.yaml"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("of", SETS)
def test_a_stack_has_the_papers_numbers(of, size):
    config = parse(stack(of, size))
    task, optimizer, data = (config.model.task.init_args, config.model.optimizer.init_args, config.data.init_args)
    assert config.name == f"gpt2-{size}"
    decay, dropout, smoothing, penalty = TABLE_11[of]
    assert (optimizer.weight_decay, config.model.lora.dropout) == (decay, dropout)
    assert (task.label_smoothing, task.generation["length_penalty"]) == (smoothing, penalty)
    others = {"num_beams": 10, "no_repeat_ngram_size": 4, "max_new_tokens": 64, "early_stopping": "never"}
    assert task.generation == others | {"length_penalty": penalty, "eos_token_id": [50256, 628]}
    lora = config.model.lora
    assert (lora.r, lora.alpha, optimizer.lr) == (4, 32, 2e-4)
    assert {"target_modules": lora.target_modules, "slices": lora.slices} == OF_C_ATTN, "which is of the paper's size"
    assert (data.batch_size, config.trainer.max_epochs) == (8, 5)
    scheduler = config.model.lr_scheduler.init_args
    assert (scheduler.warmup, scheduler.decay) == (500, "linear")
    assert all(of in file for file in data.path.values())


def make_tiny(folder):
    """GPT-2 of one layer, and a tokenizer of GPT-2's own kind that knows bytes alone."""
    characters = sorted({c for row in restaurants(200) for text in row.values() for c in text.replace(" ", "Ġ")})
    vocabulary = {token: i for i, token in enumerate([END, *characters])}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=[], unk_token=END, bos_token=END, eos_token=END)
    tokenizer.save_pretrained(folder)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    sizes = {"vocab_size": len(vocabulary), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256}
    GPT2Config(**sizes, **ends).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("of", "size"), [("e2e", "medium"), ("webnlg", "large"), ("dart", "medium")])
def test_a_stack_runs_a_step(of, size, tmp_path):
    parts = {"train": restaurants(16), "validation": restaurants(6, seed=1), "test": restaurants(6, seed=2)}
    files = {split: str(rows_file(tmp_path / f"{split}.jsonl", rows)) for split, rows in parts.items()}
    short = "--model.task.init_args.generation.max_new_tokens=4"
    cli = run_a_step(stack(of, size), tmp_path, model=make_tiny(tmp_path / "model"), data={"path": files}, args=[short])
    assert cli.trainer.global_step == 1
    assert {"train/loss", "val/loss", "val/bleu", "val/rougeL", "val/ter"} <= set(cli.trainer.callback_metrics)
    assert cli.model.task.monitor == "val/bleu"
    row = cli.datamodule.encoded_rows("train")[0]
    told = cli.datamodule.tokenizer.decode(row["input_ids"])
    given = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    assert told == f"{given['context']}{END} {given['completion']}{END}"
    lora = {name.rpartition(".")[2] for name, p in cli.model.named_parameters() if p.requires_grad}
    assert lora == {"lora_A", "lora_B"}
