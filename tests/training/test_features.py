"""What a probe is fitted on is what the frozen backbone's head is given, and the demo's runs say so in their table."""

import json

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from demos.baselines import Baselines, features, pixels
from lora_lightning import FreezeBase, LoRAConfig, LoRAError, LoRAModule, RunReport, inject
from lora_lightning.data.images.data import ImageData
from lora_lightning.data.io.splits import SplitConfig
from lora_lightning.lora.inject import disabled
from lora_lightning.tasks.classification import ImageClassification
from tests.pictures import class_folders
from tests.tasks.says import timm_net, vit
from tests.training.test_module import trainer_of


def trained(model, **config):
    """Adapted, and moved away from where it started."""
    inject(model, LoRAConfig(r=2, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_features_are_the_pooled_map_the_class_token_and_the_maps_mean():
    images = torch.randn(2, 3, 32, 32)
    task = ImageClassification(3)

    net = trained(timm_net(3), target_modules=["conv_pw"], modules_to_save=["classifier"])
    with disabled(net), torch.no_grad():
        found = features(net, task, {"pixel_values": images, "labels": torch.zeros(2)})
        torch.testing.assert_close(found, net.forward_head(net.forward_features(images), pre_logits=True))

    small = images[..., :16, :16].contiguous()
    net = trained(vit(3), modules_to_save=["classifier"])
    with disabled(net), torch.no_grad():
        found = features(net, task, {"pixel_values": small})
        torch.testing.assert_close(found, net.vit(small).last_hidden_state[:, 0])

    net = get_model("resnet18", num_classes=3).eval()
    body = nn.Sequential(*list(net.children())[:-1])
    with torch.no_grad():
        found = features(net, task, {"pixel_values": images})
        torch.testing.assert_close(found, body(images).flatten(1))


def test_pixels_are_averaged_to_at_most_28_a_side():
    images = torch.randn(2, 3, 112, 56)
    found = pixels(images).view(2, 3, 28, 28)
    torch.testing.assert_close(found[0, 1, 3, 5], images[0, 1, 12:16, 10:12].mean())
    assert pixels(torch.randn(2, 3, 16, 16)).shape == (2, 3 * 16 * 16)


def test_a_forward_that_goes_past_the_head_is_named():
    class Past(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Flatten(), nn.Linear(12, 3)

        def forward(self, x):
            return nn.functional.linear(self.body(x), self.head.weight)

    with pytest.raises(LoRAError, match="goes past its head"):
        features(Past(), ImageClassification(3), {"pixel_values": torch.zeros(1, 3, 2, 2)})


def test_a_fit_on_images_is_told_beside_probe_pixels_and_majority(tmp_path):
    data = ImageData(
        str(class_folders(tmp_path / "set")),
        image_size=16,
        batch_size=9,
        split=SplitConfig(validation=0.25, test=0.25),
    )
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    module = LoRAModule(net, ImageClassification(3), LoRAConfig(r=2, target_modules=["0"], modules_to_save=["4"]))
    callbacks = [FreezeBase(show_table=False), RunReport(), Baselines()]
    trainer_of(tmp_path, logger=True, callbacks=callbacks).fit(module, datamodule=data)
    report = json.loads(next(tmp_path.rglob("report.json")).read_text())
    assert report["pixels_accuracy"] == 1.0, "the colour gives the class away"
    assert report["majority_test_accuracy"] == data.majority_share("test") < 0.6
    assert report["probe_accuracy"] > report["majority_accuracy"]
    assert {"probe_test_accuracy", "pixels_test_accuracy", "val_accuracy"} <= set(report)
