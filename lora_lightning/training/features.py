"""What a frozen backbone makes of its inputs, one vector for each example: what a linear probe is fitted on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.export.model_files import is_transformers
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.layers.trained.module_copy import COPY
from lora_lightning.lora.targets.output_heads import output_head
from lora_lightning.tasks.base import Task
from lora_lightning.tasks.classification import mean_features

RAW_SIDE = 28
"""To so many pixels a side images are averaged before a probe on them: MNIST's own, and near CIFAR's 32."""


def head_of(backbone: nn.Module) -> str:
    """Name of the last linear layer of the output head, or of the head itself where it has none.

    Raises:
        LoRAError: the model has no head that could be found.
    """
    heads = output_head(backbone)
    if not heads:
        raise LoRAError(
            f"{type(backbone).__name__} has no output head that could be found, and a probe is fitted on what the head"
            " is given: drop Baselines from trainer.callbacks"
        )
    head = heads[-1].partition(f".{COPY}")[0]  # of a head that is trained in full, the frozen original
    inside = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and COPY not in name.split(".") and f"{name}.".startswith(f"{head}.")
    ]
    return inside[-1] if inside else head


@torch.no_grad()
def features(backbone: nn.Module, task: Task, batch: Mapping[str, Any]) -> Tensor:
    """(n, d) in float32: of texts the mean of the last hidden states, of anything else what the head is given.

    That is the pooled map of a convolutional network and the class token of a ViT (in DINOv2 beside the mean of its
    patches); maps that come unpooled are averaged.
    """
    if is_transformers(backbone) and "attention_mask" in batch:
        return mean_features(backbone, batch)
    given: list[Tensor] = []
    head = backbone.get_submodule(head_of(backbone))
    hook = head.register_forward_pre_hook(lambda _, args: given.append(args[0].detach().float()))
    try:
        backbone(**task.inputs(backbone, batch))
    finally:
        hook.remove()
    if not given:
        raise LoRAError(
            f"the forward of {type(backbone).__name__} goes past its head: drop Baselines from the callbacks"
        )
    found = given[-1]
    return found.mean(tuple(range(2, found.dim()))) if found.dim() == 4 else found.flatten(1)


def pixels(images: Tensor) -> Tensor:
    """Images (n, channels, h, w) averaged to at most 28 x 28 pixels, as vectors."""
    size = (min(RAW_SIDE, images.shape[-2]), min(RAW_SIDE, images.shape[-1]))
    return F.adaptive_avg_pool2d(images.float(), size).flatten(1)
