"""The demo's recipe on a tiny model and a few rows: that a recipe can be tested so, and that it runs."""

import pytest
from jsonargparse import Namespace
from transformers import RobertaConfig

from tests.recipes.recipe import head_of, parse, rows_file, run_a_step, tiny_model


def test_a_later_file_and_a_flag_win():
    config = parse(["demo.yaml", "debug.yaml"], "--model.lora.r", "3")
    assert (config.name, config.model.lora.r, config.trainer.max_epochs) == ("debug", 3, 1)
    assert head_of("demo.yaml").startswith("The demo: is a film review")


def test_a_class_that_is_not_there_is_no_recipe(tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text("model: {task: {class_path: lora_lightning.NoSuchTask}}\n")
    with pytest.raises(SystemExit):
        parse(["demo.yaml", tmp_path / "wrong.yaml"])
    assert "NoSuchTask" in capsys.readouterr().err


def test_the_demo_runs_a_step(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=64, max_position_embeddings=40, type_vocab_size=1, **sizes)
    model = tiny_model(tmp_path / "model", config, ["the", "film", "is", "fine", "dull"])
    rows = [
        {"text": f"the film is {'fine' if i % 2 else 'dull'} {i}", "category": f"{i % 2}", "movie_name": f"film {i}"}
        for i in range(20)
    ]
    data = {"path": str(rows_file(tmp_path / "rows.jsonl", rows)), "drop_labels": []}
    cli = run_a_step(
        ["demo.yaml"],
        tmp_path,
        model=model,
        data=data,
        args=["--model.lora.exclude_modules", "null", "--trainer.callbacks", "[]"],
    )
    assert isinstance(cli.config, Namespace)
    assert cli.trainer.global_step == 1
    assert cli.model.backbone.config.hidden_size == 16
    assert {"val/accuracy", "train/loss"} <= set(cli.trainer.callback_metrics)
