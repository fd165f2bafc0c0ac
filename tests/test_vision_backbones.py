"""timm's and torchvision's models by name, with a new head where the data want one."""

import sys

import pytest
import torch

from lora_lightning import LoRAConfig, LoRAError, LoRAModule
from lora_lightning.backbones.vision import timm_model, torchvision_model
from lora_lightning.tasks.classification import ImageClassification

IMAGES = torch.zeros(2, 3, 32, 32)


def saved(model, file):
    torch.save({"state_dict": model.state_dict()}, file)
    return str(file)


def test_weights_of_a_file_fill_all_but_a_head_of_another_size(tmp_path):
    for make, name, head in (
        (timm_model, "test_efficientnet", "classifier"),
        (torchvision_model, "squeezenet1_1", "classifier.1"),
    ):
        none = {"pretrained": False} if make is timm_model else {"weights": None}
        whole = make(name, **none, num_classes=7)
        file = saved(whole, tmp_path / f"{name}.pth")
        again = make(name, num_classes=7, checkpoint_path=file)
        torch.testing.assert_close(again.eval()(IMAGES), whole.eval()(IMAGES))
        assert again.new_keys == []
        other = make(name, num_classes=3, checkpoint_path=file)
        assert sorted(other.new_keys) == [f"{head}.bias", f"{head}.weight"]
        assert other.eval()(IMAGES).shape == (2, 3)
        own = whole.state_dict()
        kept = {key: t for key, t in other.state_dict().items() if key not in other.new_keys}
        assert all(torch.equal(t, own[key]) for key, t in kept.items())


def test_pretrained_weights_of_torchvision_keep_all_but_the_head(monkeypatch, tmp_path):
    from torchvision.models import ResNet18_Weights, get_model

    whole = get_model("resnet18")
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda *args, **kwargs: whole.state_dict())
    model = torchvision_model("resnet18", "IMAGENET1K_V1", num_classes=5)
    assert model.new_keys == ["fc.weight", "fc.bias"]
    assert model.fc.out_features == 5
    assert torch.equal(model.layer4[1].conv2.weight, whole.layer4[1].conv2.weight)
    same = torchvision_model("resnet18", num_classes=1000)
    assert same.new_keys == []


def test_a_segmentation_model_has_as_many_maps_as_asked():
    model = torchvision_model("lraspp_mobilenet_v3_large", weights=None, num_classes=4)
    assert model.eval()(torch.zeros(1, 3, 32, 32))["out"].shape == (1, 4, 32, 32)


def test_a_new_head_that_stays_frozen_is_warned_of(tmp_path):
    file = saved(timm_model("test_efficientnet", pretrained=False, num_classes=7), tmp_path / "x.pth")
    model = timm_model("test_efficientnet", num_classes=3, checkpoint_path=file)
    with pytest.warns(UserWarning, match="classifier: new, with random weights, and frozen"):
        LoRAModule(model, ImageClassification(3), LoRAConfig(r=2, target_modules=["conv_pw", "conv_pwl"]))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda d: timm_model("tf_efficientnet_lit0"), "'tf_efficientnet_lit0'; did you mean 'tf_efficientnet_l"),
        (lambda d: timm_model("vit_tiny_patch16_224.no"), "timm has no weights 'no' of 'vit_tiny_patch16_224'"),
        (lambda d: timm_model("test_vit", pretrained=False, model_kwargs={"depht": 1}), "timm cannot make 'test_vit'"),
        (lambda d: torchvision_model("resnet81"), "torchvision has no model 'resnet81'; did you mean 'resnet18'"),
        (lambda d: torchvision_model("resnet18", "IMAGENET1K_V3"), r"'IMAGENET1K_V3'.*did you mean 'IMAGENET1K_V1'"),
        (lambda d: timm_model("test_vit", checkpoint_path=str(d / "none.pth")), "no file"),
        (
            lambda d: timm_model("test_vit", checkpoint_path=saved(timm_model("test_vit2", False), d / "x.pth")),
            r"x\.pth does not fit VisionTransformer: ",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_named(make, said, tmp_path):
    with pytest.raises(LoRAError, match=said):
        make(tmp_path)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(LoRAError, match=r"pip install 'lora_lightning\[vision\]'"):
        timm_model("test_vit")
