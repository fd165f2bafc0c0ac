"""What a probe is fitted on is what the frozen backbone's head is given, and the demo's runs say so in their table."""

import json

import pytest
import torch
from timm import create_model
from torch import nn
from torchvision.models import get_model

from demos.baselines import Baselines, features
from lora_lightning import FreezeBase, LoRAConfig, LoRAError, LoRAModule, RunReport, inject
from lora_lightning.data.images.data import ImageData
from lora_lightning.data.io.splits import SplitConfig
from lora_lightning.lora.inject import disabled
from lora_lightning.tasks.classification import ImageClassification
from tests.factories import hf, move
from tests.pictures import class_folders
from tests.training.small import Vision, fit, trainer_of


def test_features_are_the_pooled_map_the_class_token_and_the_maps_mean():
    images, task = torch.randn(2, 3, 32, 32), ImageClassification(3)
    small = images[..., :16, :16].contiguous()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    hugging = hf("ViTForImageClassification", **sizes, image_size=16, patch_size=8, num_labels=3)
    timm, torchs = create_model("test_efficientnet", num_classes=3), get_model("resnet18", num_classes=3).eval()
    inject(timm, LoRAConfig(r=2, target_modules=["conv_pw"], modules_to_save=["classifier"]))
    inject(hugging, LoRAConfig(r=2, modules_to_save=["classifier"]))
    body = nn.Sequential(*list(torchs.children())[:-1])
    cases = [
        (move(timm).eval(), images, lambda x: timm.forward_head(timm.forward_features(x), pre_logits=True)),
        (move(hugging).eval(), small, lambda x: hugging.vit(x).last_hidden_state[:, 0]),
    ]
    for net, pixel_values, expected in cases:
        with disabled(net), torch.no_grad():
            found = features(net, task, {"pixel_values": pixel_values, "labels": torch.zeros(2)})
            torch.testing.assert_close(found, expected(pixel_values))
    with torch.no_grad():
        torch.testing.assert_close(features(torchs, task, {"pixel_values": images}), body(images).flatten(1))


def test_baselines_say_what_they_cannot_do(tmp_path, make_module, make_data):
    past = nn.ModuleDict({"body": nn.Flatten(), "head": nn.Linear(12, 3)})
    past.forward = lambda x: nn.functional.linear(past["body"](x), past["head"].weight)
    with pytest.raises(LoRAError, match="goes past its head"):
        features(past, ImageClassification(3), {"pixel_values": torch.zeros(1, 3, 2, 2)})
    with pytest.raises(LoRAError, match=r"such as TextClassificationData: drop it from trainer\.callbacks"):
        fit(tmp_path, make_module(Vision(), LoRAConfig(r=2)), Baselines())
    headless = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(2))
    with pytest.raises(LoRAError, match="ModuleList has no output head that could be found"):
        fit(tmp_path, make_module(headless, LoRAConfig(r=2)), Baselines(), data=make_data())


def report_of(tmp_path, module, data):
    callbacks = [FreezeBase(show_table=False), RunReport(), Baselines()]
    trainer_of(tmp_path, logger=True, callbacks=callbacks).fit(module, datamodule=data)
    report = json.loads(next(tmp_path.rglob("report.json")).read_text())
    assert report["majority_test_accuracy"] == data.majority_share("test")
    assert report["majority_accuracy"] == data.majority_share("validation") < report["probe_accuracy"]
    assert {"probe_test_accuracy", "val_accuracy"} <= set(report)
    return report


def test_a_fit_on_images_is_told_beside_probe_pixels_and_majority(tmp_path):
    split = SplitConfig(validation=0.25, test=0.25)
    data = ImageData(str(class_folders(tmp_path / "set")), image_size=16, batch_size=9, split=split)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    module = LoRAModule(net, ImageClassification(3), LoRAConfig(r=2, target_modules=["0"], modules_to_save=["4"]))
    report = report_of(tmp_path, module, data)
    assert report["pixels_accuracy"] == 1.0, "the colour gives the class away"
    assert "pixels_test_accuracy" in report


def test_a_fit_on_texts_is_told_beside_probe_and_majority(tmp_path, make_module, make_data):
    assert report_of(tmp_path, make_module(), make_data())["probe_accuracy"] > 0.8, "a bag of words gives the label"
