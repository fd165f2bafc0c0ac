"""The recipes for images: each is parsed, and runs a step with random weights on tiny images of tiny nets."""

import pytest
import torch
from transformers import SegformerConfig, SegformerImageProcessor, ViTConfig, ViTImageProcessor

from tests.data.test_segmentation import make as make_masks
from tests.pictures import class_folders
from tests.recipes.recipe import files_of, head_of, parse, run_a_step

BASE = "vision/base.yaml"
RECIPES = [file for file in files_of("vision") if file != BASE]
SPLIT = {"validation": 0.25, "test": 0.25}


def tiny_vit(folder):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTConfig(**sizes, image_size=16, patch_size=8).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def tiny_segformer(folder):
    SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 16], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 1], mlp_ratios=[1, 1], decoder_hidden_size=16,
    ).save_pretrained(folder)  # fmt: skip
    SegformerImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def tiny(recipe, folder):
    """Arguments of the backbone and of the data in the place of what would be downloaded."""
    if "vit" in recipe or "segformer" in recipe:
        name = (tiny_vit if "vit" in recipe else tiny_segformer)(folder / "model")
        return {"pretrained_model_name_or_path": name, "random_weights": True}, {"preprocessing": name}
    if "convnext" in recipe:
        return {"model_name": "test_convnext", "pretrained": False}, {"image_size": 32}
    return {"model_name": "resnet18", "weights": None}, {"image_size": 32}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_what_it_is_and_parses(recipe):
    assert "it reproduces no table" in head_of(recipe)
    config = parse([BASE, recipe])
    assert config.model.lora.modules_to_save
    assert config.data.init_args.preprocessing


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_a_step(recipe, tmp_path):
    backbone, data = tiny(recipe, tmp_path)
    path = make_masks(tmp_path / "set") if "segformer" in recipe else class_folders(tmp_path / "set")
    lora = ["--model.lora.r", "2"]
    if "resnet" in recipe:  # the basic blocks of the smaller one have no third convolution
        lora += ["--model.lora.target_modules", "[conv1, conv2]"]
    cli = run_a_step(
        [BASE, recipe], tmp_path, backbone=backbone, data={"path": str(path), "split": SPLIT, **data}, args=lora
    )
    assert cli.trainer.global_step == 1
    classes = 2 if "segformer" in recipe else 3
    assert cli.model.task.num_classes == cli.datamodule.num_classes == classes
    assert torch.isfinite(cli.trainer.callback_metrics["val/loss"])
    assert cli.model.task.monitor in cli.trainer.callback_metrics
