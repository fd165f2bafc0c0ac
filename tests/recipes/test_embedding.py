"""The recipes of embeddings: each is parsed, and runs a step on a tiny encoder or a tiny CLIP."""

import numpy as np
import pytest
from PIL import Image
from transformers import BertConfig, CLIPConfig, CLIPImageProcessor, CLIPProcessor

from tests.recipes.recipe import files_of, head_of, parse, rows_file, run_a_step, tiny_model
from tests.tiny_pairs import COLOURS, WORDS, make_tokenizer

FIGURES = {"val/loss", "val/mrr", "val/recall@1", "val/recall@5", "train/loss"}


@pytest.mark.parametrize("file", files_of("embedding"))
def test_a_recipe_is_parsed_and_says_what_it_needs(file):
    config = parse([file])
    assert config.model.task.class_path.endswith("ContrastiveEmbedding")
    assert "Needs " in head_of(file)
    assert "Values: " in head_of(file)


def tiny_texts(folder):
    """A tiny encoder, and a file of pairs."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = tiny_model(folder / "model", BertConfig(vocab_size=64, max_position_embeddings=40, **sizes), WORDS)
    rows = [
        {"anchor": f"what colour is {c} {i}", "positive": f"it is {c} {i}", "negative": "no idea"}
        for i in range(10)
        for c in COLOURS
    ]
    return model, rows_file(folder / "rows.jsonl", rows)


def tiny_clip(folder):
    """Arguments of the backbone and of the data for a tiny CLIP and a few images with texts."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 32, "max_position_embeddings": 24, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 8, "patch_size": 4}, projection_dim=8)
    config.save_pretrained(folder / "clip")
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    CLIPProcessor(images, make_tokenizer(folder / "clip")).save_pretrained(folder / "clip")
    rows = []
    for i in range(20):
        Image.fromarray(np.full((9, 9, 3), 12 * i, dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": f"it is {COLOURS[i % 6]}"})
    return (
        {"pretrained_model_name_or_path": str(folder / "clip"), "random_weights": True},
        {"path": str(rows_file(folder / "rows.jsonl", rows)), "processor": str(folder / "clip")},
    )


@pytest.mark.parametrize("file", ["embedding/minilm-pairs.yaml", "embedding/e5-pairs.yaml"])
def test_texts_run_a_step(file, tmp_path):
    model, rows = tiny_texts(tmp_path)
    cli = run_a_step([file], tmp_path, model=model, data={"path": str(rows)})
    assert cli.trainer.global_step == 1
    assert set(cli.trainer.callback_metrics) >= FIGURES


def test_images_and_texts_run_a_step(tmp_path):
    backbone, data = tiny_clip(tmp_path)
    cli = run_a_step(["embedding/clip-image-text.yaml"], tmp_path, backbone=backbone, data=data)
    assert cli.trainer.global_step == 1
    assert set(cli.trainer.callback_metrics) >= FIGURES
    assert any("vision" in row.module for row in cli.model.report.modules)
    assert any("text" in row.module for row in cli.model.report.modules)
