"""Backbones that give what they were made with, and tiny nets that take images under a name of their own."""

import timm
from torch import nn
from torchvision.models import get_model
from transformers import ViTConfig, ViTForImageClassification


class Says(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


def vit(labels):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=labels))


def timm_net(labels):
    return timm.create_model("test_efficientnet", num_classes=labels)


NETS = {
    "transformers": (vit, 16),
    "torchvision": (lambda labels: get_model("squeezenet1_1", num_classes=labels), 32),
    "timm": (timm_net, 32),
    "own": (lambda labels: nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, labels)), 16),
}
"""How a net is made, and the side of its images."""
