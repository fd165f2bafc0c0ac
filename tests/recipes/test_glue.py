"""The paper's GLUE runs: every stack is parsed and holds Table 9's numbers; one of each kind runs a step."""

import random

import pytest
from transformers import DebertaV2Config, RobertaConfig

from lora_lightning import LoRAError
from tests.recipes.recipe import files_of, head_of, parse, rows_file, run_a_step, tiny_model

TASKS = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
# Batch, epochs and learning rate of Table 9, in the order of TASKS.
TABLE_9 = {
    "roberta-base": (
        (16, 16, 16, 32, 32, 16, 32, 16),
        (30, 60, 30, 80, 25, 25, 80, 40),
        (5e-4, 5e-4, 4e-4, 4e-4, 4e-4, 5e-4, 5e-4, 4e-4),
    ),
    "roberta-large": (
        (4, 4, 4, 4, 4, 4, 8, 8),
        (10, 10, 20, 20, 10, 20, 20, 30),
        (3e-4, 4e-4, 3e-4, 2e-4, 2e-4, 3e-4, 4e-4, 2e-4),
    ),
}
ALPHA = {"roberta-base": 8, "roberta-large": 16}
FROM_MNLI = ("mrpc", "rte", "stsb")
TWO = ("sentence1", "sentence2")
COLUMNS = {
    "mnli": ("premise", "hypothesis"), "sst2": ("sentence",), "mrpc": TWO, "cola": ("sentence",),
    "qnli": ("question", "sentence"), "qqp": ("question1", "question2"), "rte": TWO, "stsb": TWO,
}  # fmt: skip
WORDS = ("the", "film", "is", "fine", "dull", "a", "story", "of", "friends")


def stack(model, task):
    return ["glue/base.yaml", f"glue/tasks/{task}.yaml", f"glue/{model}/{task}.yaml"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", TABLE_9)
def test_a_stack_holds_the_papers_numbers(model, task):
    config = parse(stack(model, task))
    batch, epochs, rate = (column[TASKS.index(task)] for column in TABLE_9[model])
    assert config.name == f"{model}-{task}"
    assert (config.trainer.max_epochs, config.data.init_args.batch_size) == (epochs, batch)
    optimizer = config.model.optimizer.init_args
    assert (optimizer.lr, optimizer.weight_decay, config.model.lr_scheduler.init_args.warmup) == (rate, 0.1, 0.06)
    lora = config.model.lora
    assert (lora.r, lora.alpha, lora.target_modules, lora.dropout) == (8, ALPHA[model], "query-value", 0.0)
    assert config.model.init_adapter == (f"runs/{model}-mnli" if task in FROM_MNLI else None)
    own = config.data.init_args
    assert (own.name, own.path, own.split.test) == (task, "nyu-mll/glue", 0.0)
    assert tuple(filter(None, (own.text_column, own.text_pair_column))) == COLUMNS[task]
    short = model == "roberta-large" and task in ("mnli", "cola", "stsb")
    assert own.max_length == (128 if short else 512), "of the authors' scripts"
    for name in (own.tokenizer, config.model.backbone.init_args.pretrained_model_name_or_path):
        assert name == f"FacebookAI/{model}"


# Of the authors' scripts, for each of eight processes: batch, epochs, learning rate, length, warm-up steps, dropout of
# the classifier, weight decay.
DEBERTA = {
    "mnli": (8, 5, 1e-4, 256, 1000, 0.15, 0.0),
    "sst2": (8, 16, 6e-5, 128, 1000, 0.0, 0.01),
    "mrpc": (32, 30, 2e-4, 128, 0, 0.0, 0.01),
    "cola": (4, 10, 1.3e-4, 64, 100, 0.1, 0.0),
    "qnli": (6, 8, 1e-4, 512, 500, 0.1, 0.01),
    "qqp": (8, 11, 1e-4, 320, 10000, 0.2, 0.01),
    "rte": (4, 11, 2.6e-4, 320, 50, 0.2, 0.01),
    "stsb": (4, 10, 2e-4, 128, 100, 0.2, 0.1),
}


@pytest.mark.parametrize("task", DEBERTA)
def test_a_stack_of_deberta_holds_the_numbers_of_the_authors_scripts(task):
    config = parse(stack("deberta-v2-xxlarge", task))
    model, data, trainer = config.model, config.data.init_args, config.trainer
    optimizer, warmup = model.optimizer.init_args, model.lr_scheduler.init_args.warmup
    dropout = model.backbone.init_args.model_kwargs["cls_dropout"]
    lengths = (data.batch_size, trainer.max_epochs, optimizer.lr, data.max_length)
    assert (*lengths, warmup, dropout, optimizer.weight_decay) == DEBERTA[task]
    assert trainer.accumulate_grad_batches == 8, "one process takes the batches of their eight"
    assert (model.lora.r, model.lora.alpha, model.lora.target_modules) == (16, 32, "query-value")
    assert model.init_adapter == ("runs/deberta-v2-xxlarge-mnli" if task in FROM_MNLI else None)
    for name in (data.tokenizer, model.backbone.init_args.pretrained_model_name_or_path):
        assert name == "microsoft/deberta-v2-xxlarge"


@pytest.mark.parametrize("file", files_of("glue"))
def test_a_file_says_in_its_head_what_it_is_and_needs(file):
    head = head_of(file)
    assert "Needs: " in head
    assert "memory" not in head, "every number has its source"
    if not file.startswith(("glue/tasks", "glue/base")):
        task = file.split("/")[-1].removesuffix(".yaml")
        assert "Table 2 of arXiv 2106.09685" in head
        assert "from the authors' scripts" in head
        assert f"-c configs/glue/base.yaml -c configs/glue/tasks/{task}.yaml -c configs/{file}" in head


def table(task, labels, count):
    rng = random.Random(task)
    return [
        {**{c: " ".join(rng.choices(WORDS, k=6)) for c in COLUMNS[task]}, "label": labels[i % len(labels)], "idx": i}
        for i in range(count)
    ]


def files(task, folder):
    """Small files with GLUE's own columns and splits; the labels of its test sets are hidden."""
    labels = {"mnli": [0, 1, 2], "stsb": [0.0, 2.5, 4.75]}.get(task, [0, 1])
    sets = ("_matched", "_mismatched") if task == "mnli" else ("",)
    parts = {"train": table(task, labels, 16)}
    for name in sets:
        parts |= {f"validation{name}": table(task, labels, 6), f"test{name}": table(task, [-1], 4)}
    return {split: str(rows_file(folder / f"{split}.jsonl", rows)) for split, rows in parts.items()}


LOGGED = {
    "mnli": {"val/accuracy", "val/f1", "val_mismatched/accuracy"},
    "cola": {"val/matthews", "val/accuracy"},
    "mrpc": {"val/accuracy", "val/binary_f1"},
    "stsb": {"val/pearson", "val/spearman"},
}


def config_of():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return RobertaConfig(vocab_size=32, max_position_embeddings=40, type_vocab_size=1, **sizes)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("roberta"), config_of(), WORDS)


def overrides(task, folder):
    return {"path": files(task, folder), "name": None, "max_length": 32, "batch_size": 8}


@pytest.mark.parametrize("task", LOGGED)
@pytest.mark.filterwarnings("ignore")
def test_a_recipe_runs_a_step(task, roberta, tmp_path):
    afresh = ["--model.init_adapter", "null"]
    data = overrides(task, tmp_path)
    cli = run_a_step(stack("roberta-base", task), tmp_path, model=roberta, data=data, args=afresh)
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
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    more = {"max_position_embeddings": 40, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    config = DebertaV2Config(vocab_size=32, type_vocab_size=0, **sizes, **more)
    model = tiny_model(tmp_path / "deberta", config, WORDS)
    data = overrides("cola", tmp_path)
    cli = run_a_step(stack("deberta-v2-xxlarge", "cola"), tmp_path, model=model, data=data)
    assert set(cli.model.report.saved) == {"pooler", "classifier"}
    assert [m.parameters for m in cli.model.report.modules] == [2 * 16 * 16] * 4
    assert cli.model.backbone.dropout.p == pytest.approx(0.1)


@pytest.mark.filterwarnings("ignore")
def test_mrpc_starts_from_the_mnli_run_where_the_recipe_looks_for_it(roberta, tmp_path):
    """With the recipes' own names of runs; the head alone is new."""
    whole = ["--trainer.fast_dev_run", "false", "--trainer.max_steps", "2"]
    data = overrides("mnli", tmp_path / "mnli")
    base = run_a_step(stack("roberta-base", "mnli"), tmp_path, model=roberta, data=data, args=whole)
    data = overrides("mrpc", tmp_path / "mrpc")
    mrpc = run_a_step(
        stack("roberta-base", "mrpc"), tmp_path, model=roberta, data=data, args=["--model.optimizer.lr", "0"]
    )
    for key, tensor in base.model.backbone.state_dict().items():
        if "lora_" in key and "lora_copy" not in key:
            assert tensor.equal(mrpc.model.backbone.state_dict()[key]), key


def test_without_the_mnli_run_the_error_names_the_folder(roberta, tmp_path):
    with pytest.raises(LoRAError, match="no checkpoint or run folder 'runs/roberta-base-mnli'"):
        run_a_step(stack("roberta-base", "rte"), tmp_path, model=roberta, data=overrides("rte", tmp_path))
