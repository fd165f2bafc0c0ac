"""The paper's GLUE runs: every stack is parsed and holds Table 9's numbers; one of each kind runs a step."""

import random

import pytest
from transformers import DebertaV2Config, RobertaConfig

from tests.recipes.recipe import parse, rows_file, run_a_step, tiny_model

TASKS = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
FROM_MNLI = ("mrpc", "rte", "stsb")
TWO = ("sentence1", "sentence2")
COLUMNS = {
    "mnli": ("premise", "hypothesis"), "sst2": ("sentence",), "mrpc": TWO, "cola": ("sentence",),
    "qnli": ("question", "sentence"), "qqp": ("question1", "question2"), "rte": TWO, "stsb": TWO,
}  # fmt: skip
WORDS = ("the", "film", "is", "fine", "dull", "a", "story", "of", "friends")
MODELS = {
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


def stack(model, task):
    return ["glue/base.yaml", f"glue/tasks/{task}.yaml", f"glue/{model}/{task}.yaml"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", MODELS)
def test_a_stack_holds_the_papers_numbers(model, task):
    config, (hub, rank, alpha) = parse(stack(model, task)), MODELS[model]
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
    path = {split: str(rows_file(folder / f"{split}.jsonl", made)) for split, made in parts.items()}
    return {"path": path, "name": None, "max_length": 32, "batch_size": 8}


LOGGED = {
    "mnli": {"val/accuracy", "val/f1", "val_mismatched/accuracy"},
    "cola": {"val/matthews", "val/accuracy"},
    "mrpc": {"val/accuracy", "val/binary_f1"},
    "stsb": {"val/pearson", "val/spearman"},
}


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"vocab_size": 32, "max_position_embeddings": 40}


@pytest.mark.parametrize("task", LOGGED)
@pytest.mark.filterwarnings("ignore")
def test_a_recipe_runs_a_step(task, tmp_path):
    model = tiny_model(tmp_path / "model", RobertaConfig(**SIZES, type_vocab_size=1), WORDS)
    given = {"model": model, "data": small(task, tmp_path), "args": ["--model.init_adapter", "null"]}
    cli = run_a_step(stack("roberta-base", task), tmp_path, **given)
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
    model = tiny_model(tmp_path / "deberta", DebertaV2Config(**SIZES, **more), WORDS)
    cli = run_a_step(stack("deberta-v2-xxlarge", "cola"), tmp_path, model=model, data=small("cola", tmp_path))
    assert set(cli.model.report.saved) == {"pooler", "classifier"}
    assert [m.parameters for m in cli.model.report.modules] == [2 * 16 * 16] * 4
    assert cli.model.backbone.dropout.p == pytest.approx(0.1)
