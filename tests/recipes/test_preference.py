"""The recipes of preference tuning: each is parsed, and runs a step on a tiny Llama or Mistral."""

import pytest
from transformers import LlamaConfig, MistralConfig

from tests.recipes.recipe import files_of, head_of, parse, rows_file, run_a_step, tiny_model
from tests.tiny_pairs import TEMPLATE, WORDS, as_messages, preferences

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("file", files_of("preference"))
def test_a_recipe_is_parsed_and_says_what_it_needs(file):
    config = parse([file])
    assert config.model.task.class_path.endswith("PreferenceTuning")
    assert "Needs " in head_of(file)
    assert "Values" in head_of(file) or "values of" in head_of(file)


def test_the_handbooks_values_are_in_the_recipe():
    config = parse(["preference/zephyr-7b-dpo.yaml"])
    lora, data = config.model.lora, config.data.init_args
    assert (lora.r, lora.alpha, lora.dropout, len(lora.target_modules)) == (16, 16, 0.05, 7)
    assert (config.model.task.init_args.beta, config.model.optimizer.init_args.lr) == (0.01, 5e-6)
    assert (data.max_length, data.max_prompt_length, data.batch_size) == (1024, 512, 4)


def tiny(file, folder):
    """The model, and further arguments for `run_a_step`."""
    config = (LlamaConfig if "smollm2" in file else MistralConfig)(**TINY)
    model = tiny_model(folder / "model", config, WORDS, chat_template=TEMPLATE, pair=False)
    if "smollm2" in file:
        rows = [{**row, "prompt": f"{row['prompt']} {i}"} for i, row in enumerate(preferences(30))]
        return {"model": model, "data": {"path": str(rows_file(folder / "rows.jsonl", rows))}}
    whole = [as_messages(row) for row in preferences(12)]
    rows = [{c: row["prompt"] + row[c] for c in ("chosen", "rejected")} for row in whole]
    files = {split: str(rows_file(folder / f"{split}.jsonl", rows)) for split in ("train", "validation")}
    plain = {"model_kwargs": None, "dtype": "float32"}
    return {"model": model, "backbone": plain, "data": {"path": files, "num_proc": None}}


def test_smollm2_runs_a_step(tmp_path):
    file = "preference/smollm2-dpo.yaml"
    cli = run_a_step([file], tmp_path, **tiny(file, tmp_path))
    assert cli.trainer.global_step == 1
    assert {"val/loss", "val/accuracy", "val/margin"} <= set(cli.trainer.callback_metrics)


def test_zephyr_runs_a_step_on_whole_conversations(tmp_path):
    file = "preference/zephyr-7b-dpo.yaml"
    cli = run_a_step([file], tmp_path, **tiny(file, tmp_path))
    assert cli.trainer.global_step == 1
    assert len(cli.model.report.modules) == 7
