"""The paper's runs on GLUE and with GPT-2: every stack is parsed and holds its numbers; some run a step."""

import json
import random

import pytest
from transformers import DebertaV2Config, GPT2Config, GPT2Tokenizer, RobertaConfig

from tests.data.files import write
from tests.lora.test_paper_counts import OF_C_ATTN
from tests.recipes.recipe import parse, run_a_step, tiny_model
from tests.tiny_text import restaurants

TASKS = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
FROM_MNLI = ("mrpc", "rte", "stsb")
TWO = ("sentence1", "sentence2")
COLUMNS = {
    "mnli": ("premise", "hypothesis"), "sst2": ("sentence",), "mrpc": TWO, "cola": ("sentence",),
    "qnli": ("question", "sentence"), "qqp": ("question1", "question2"), "rte": TWO, "stsb": TWO,
}  # fmt: skip
WORDS = ("the", "film", "is", "fine", "dull", "a", "story", "of", "friends")
ROBERTAS = {
    "roberta-base": ("FacebookAI/roberta-base", 8, 8),
    "roberta-large": ("FacebookAI/roberta-large", 8, 16),
    "deberta-v2-xxlarge": ("microsoft/deberta-v2-xxlarge", 16, 32),
}
"""Where a model lies, r and alpha."""
# In the order of TASKS: batch, epochs and learning rate of Table 9; length and, of DeBERTa, warm-up steps, dropout of
# the classifier and weight decay of the authors' scripts, whose batches are for each of eight processes.
NUMBERS = {
    "roberta-base": (
        (16, 16, 16, 32, 32, 16, 32, 16),
        (30, 60, 30, 80, 25, 25, 80, 40),
        (5e-4, 5e-4, 4e-4, 4e-4, 4e-4, 5e-4, 5e-4, 4e-4),
        (512,) * 8,
    ),
    "roberta-large": (
        (4, 4, 4, 4, 4, 4, 8, 8),
        (10, 10, 20, 20, 10, 20, 20, 30),
        (3e-4, 4e-4, 3e-4, 2e-4, 2e-4, 3e-4, 4e-4, 2e-4),
        (128, 512, 512, 128, 512, 512, 512, 128),
    ),
    "deberta-v2-xxlarge": (
        (8, 8, 32, 4, 6, 8, 4, 4),
        (5, 16, 30, 10, 8, 11, 11, 10),
        (1e-4, 6e-5, 2e-4, 1.3e-4, 1e-4, 1e-4, 2.6e-4, 2e-4),
        (256, 128, 128, 64, 512, 320, 320, 128),
        (1000, 1000, 0, 100, 500, 10000, 50, 100),
        (0.15, 0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.2),
        (0.0, 0.01, 0.01, 0.0, 0.01, 0.01, 0.01, 0.1),
    ),
}


def stack_of_glue(model, task):
    return ["glue/base.yaml", f"glue/tasks/{task}.yaml", f"glue/{model}/{task}.yaml"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", ROBERTAS)
def test_a_stack_of_glue_holds_the_papers_numbers(model, task):
    config, (hub, rank, alpha) = parse(stack_of_glue(model, task)), ROBERTAS[model]
    optimizer, data = config.model.optimizer.init_args, config.data.init_args
    found = [data.batch_size, config.trainer.max_epochs, optimizer.lr, data.max_length]
    rest = [config.model.lr_scheduler.init_args.warmup, optimizer.weight_decay]
    if model == "deberta-v2-xxlarge":
        found += [rest[0], config.model.backbone.init_args.model_kwargs["cls_dropout"], rest[1]]
        assert config.trainer.accumulate_grad_batches == 8, "one process takes the batches of their eight"
    else:
        assert rest == [0.06, 0.1]
    assert found == [column[TASKS.index(task)] for column in NUMBERS[model]]
    lora = config.model.lora
    assert (lora.r, lora.alpha, lora.target_modules, lora.dropout) == (rank, alpha, "query-value", 0.0)
    assert config.name == f"{model}-{task}"
    assert config.model.init_adapter == (f"runs/{model}-mnli" if task in FROM_MNLI else None)
    assert (data.name, data.path, data.split.test) == (task, "nyu-mll/glue", 0.0)
    assert tuple(filter(None, (data.text_column, data.text_pair_column))) == COLUMNS[task]
    assert data.tokenizer == config.model.backbone.init_args.pretrained_model_name_or_path == hub


def small(task, folder):
    """The data's arguments over small files with GLUE's own columns and splits; its test sets' labels are hidden."""
    labels = {"mnli": [0, 1, 2], "stsb": [0.0, 2.5, 4.75]}.get(task, [0, 1])
    rng = random.Random(task)

    def rows(labels, count):
        texts = [{column: " ".join(rng.choices(WORDS, k=6)) for column in COLUMNS[task]} for _ in range(count)]
        return [{**text, "label": labels[i % len(labels)], "idx": i} for i, text in enumerate(texts)]

    parts = {"train": rows(labels, 16)}
    for name in ("_matched", "_mismatched") if task == "mnli" else ("",):
        parts |= {f"validation{name}": rows(labels, 6), f"test{name}": rows([-1], 4)}
    path = {split: str(write(folder / f"{split}.jsonl", made)) for split, made in parts.items()}
    return {"path": path, "name": None, "max_length": 32, "batch_size": 8}


LOGGED = {
    "mnli": {"val/accuracy", "val/f1", "val_mismatched/accuracy"},
    "cola": {"val/matthews", "val/accuracy"},
    "mrpc": {"val/accuracy", "val/binary_f1"},
    "stsb": {"val/pearson", "val/spearman"},
}


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SMALL |= {"vocab_size": 32, "max_position_embeddings": 40}


@pytest.mark.parametrize("task", LOGGED)
@pytest.mark.filterwarnings("ignore")
def test_a_stack_of_glue_runs_a_step(task, tmp_path):
    model = tiny_model(tmp_path / "model", RobertaConfig(**SMALL, type_vocab_size=1), WORDS)
    given = {"model": model, "data": small(task, tmp_path), "args": ["--model.init_adapter", "null"]}
    cli = run_a_step(stack_of_glue("roberta-base", task), tmp_path, **given)
    assert cli.trainer.global_step == 1
    assert LOGGED[task] <= set(cli.trainer.callback_metrics)
    assert cli.model.backbone.config.num_labels == {"mnli": 3, "stsb": 1}.get(task, 2)
    assert cli.model.backbone.training, "the backbone's own dropout is on, as in the paper's runs"
    # A and B of query and value in each of two layers, and the head.
    assert [m.parameters for m in cli.model.report.modules] == [2 * 8 * 16] * 4
    assert set(cli.model.report.saved) == {"classifier"}
    sets = {"predict", "predict_mismatched"} if task == "mnli" else {"predict"}
    assert {name for name in cli.datamodule.tables if name.startswith("predict")} == sets
    if task == "stsb":
        assert cli.model.backbone.config.problem_type == "regression"


@pytest.mark.filterwarnings("ignore")
def test_deberta_runs_a_step_and_trains_its_pooler_and_classifier(tmp_path):
    more = {"type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    model = tiny_model(tmp_path / "deberta", DebertaV2Config(**SMALL, **more), WORDS)
    cli = run_a_step(stack_of_glue("deberta-v2-xxlarge", "cola"), tmp_path, model=model, data=small("cola", tmp_path))
    assert set(cli.model.report.saved) == {"pooler", "classifier"}
    assert [m.parameters for m in cli.model.report.modules] == [2 * 16 * 16] * 4
    assert cli.model.backbone.dropout.p == pytest.approx(0.1)


# ---- GPT-2


SETS, SIZES = ["e2e", "webnlg", "dart"], ["medium", "large"]
# Table 11: weight decay, dropout, label smoothing, length penalty.
TABLE_11 = {"e2e": (0.01, 0.1, 0.1, 0.9), "webnlg": (0.01, 0.1, 0.1, 0.8), "dart": (0.0, 0.0, 0.0, 0.8)}
END = "<|endoftext|>"


def stack_of_gpt2(of, size):
    return ["gpt2/base.yaml", f"gpt2/{of}.yaml", f"gpt2/{size}.yaml"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("of", SETS)
def test_a_stack_of_gpt2_has_the_papers_numbers(of, size):
    config = parse(stack_of_gpt2(of, size))
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


def tiny_gpt2(folder):
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
def test_a_stack_of_gpt2_runs_a_step(of, size, tmp_path):
    parts = {"train": restaurants(16), "validation": restaurants(6, seed=1), "test": restaurants(6, seed=2)}
    files = {split: str(write(tmp_path / f"{split}.jsonl", rows)) for split, rows in parts.items()}
    short = "--model.task.init_args.generation.max_new_tokens=4"
    cli = run_a_step(
        stack_of_gpt2(of, size), tmp_path, model=tiny_gpt2(tmp_path / "model"), data={"path": files}, args=[short]
    )
    assert cli.trainer.global_step == 1
    assert {"train/loss", "val/loss", "val/bleu", "val/rougeL", "val/ter"} <= set(cli.trainer.callback_metrics)
    assert cli.model.task.monitor == "val/bleu"
    row = cli.datamodule.encoded_rows("train")[0]
    told = cli.datamodule.tokenizer.decode(row["input_ids"])
    given = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    assert told == f"{given['context']}{END} {given['completion']}{END}"
    lora = {name.rpartition(".")[2] for name, p in cli.model.named_parameters() if p.requires_grad}
    assert lora == {"lora_A", "lora_B"}
