"""The recipe for plain texts: parsed, and run for a step on a tiny model of its kind."""

import pytest
import torch
import yaml

from tests.recipes.recipe import CONFIGS, head_of, parse, rows_file, run_a_step
from tests.tiny_lm import make_lm, make_texts

RECIPE = "lm/texts.yaml"
WIDE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "initializer_range": 0.02}
"""Enough for the ranks of the recipe."""


def test_it_is_parsed_and_says_what_it_is():
    config = parse([RECIPE])
    assert config.model.lora.alpha == 2 * config.model.lora.r
    assert config.data.init_args.packing
    assert "Continued pre-training" in head_of(RECIPE)
    assert "arXiv 2405.09673" in head_of(RECIPE)


@pytest.mark.parametrize("model", sorted((CONFIGS / "lm" / "models").glob("*.yaml")), ids=lambda file: file.stem)
def test_it_takes_another_model(model):
    config = parse([RECIPE, model])
    name = yaml.safe_load(model.read_text())["data"]["init_args"]["tokenizer"]
    assert config.data.init_args.tokenizer == config.model.backbone.init_args.pretrained_model_name_or_path == name


def tiny(folder):
    """A tiny model of the recipe's kind, and a file of texts."""
    model = make_lm(folder / "model", "qwen3", num_hidden_layers=1, **WIDE)
    rows = [{"text": text} for text in make_texts(150)]
    return {"model": model, "data": {"path": str(rows_file(folder / "texts.jsonl", rows))}}


def test_a_step_of_it(tmp_path):
    cli = run_a_step([RECIPE], tmp_path, **tiny(tmp_path))
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    assert "position_ids" in cli.datamodule.encoded_rows("train").column_names
    assert {row.r for row in cli.model.report.modules} == {64}
