"""Backbones that give what they were made with, and tiny nets of images."""

import timm
from torch import nn
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
