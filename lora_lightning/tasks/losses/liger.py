"""liger-kernel's fused linear and cross-entropy, where it is installed and the head is frozen on a GPU.

The kernel's logits, and their gradient in the same place, have the hidden states' dtype; its loss is float32 (arXiv
2410.10989). Written against `LigerFusedLinearCrossEntropyLoss` as published; older versions, which do not count what is
right (`return_token_accuracy`), are left out.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from lora_lightning.tasks.losses.token_loss import Terms

DEVICES = ("cuda",)


@functools.cache
def _kernel() -> Any:
    """The class, or None where the package is not there, lacks what it needs itself, or is too old."""
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    counts = "return_token_accuracy" in inspect.signature(LigerFusedLinearCrossEntropyLoss).parameters
    return LigerFusedLinearCrossEntropyLoss if counts else None


def can_go_liger(hidden: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> bool:
    """Whether the kernel computes this: rows there are, W is frozen, and a scale can go into the hidden states."""
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    scales = terms.logit_scale == 1.0 or bias is None
    fits = hidden.device.type in DEVICES and hidden.dtype != torch.float64 and len(hidden) > 0
    return fits and frozen and scales and _kernel() is not None


def liger_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, terms: Terms
) -> tuple[Tensor, Tensor]:
    """Loss and number correct, of rows that are all trained on: hidden (n, d), weight (V, d), labels (n,)."""
    loss = _kernel()(
        label_smoothing=terms.label_smoothing, reduction="sum", softcap=terms.softcap, return_token_accuracy=True
    )
    scaled = hidden if terms.logit_scale == 1.0 else hidden * terms.logit_scale
    out = loss(weight, scaled, labels, bias)
    return out.loss, (out.token_accuracy.detach().double() * len(labels)).round().long()
