"""A language model's loss, in its plain form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.functional import wide_dtype
from lora_lightning.tasks.base import logits_of
from lora_lightning.tasks.linear_cross_entropy import LinearCrossEntropy, refuse_labels

IGNORED = -100
"""The label of tokens that are not trained on, as in torch and transformers."""


def shifted_loss(
    backbone: nn.Module, inputs: Mapping[str, Any], labels: Tensor, *, label_smoothing: float = 0.0
) -> LinearCrossEntropy:
    """Next-token cross-entropy: the output at position t is held to the label at t + 1.

    Args:
        backbone: returns logits (b, t, V).
        inputs: its keyword arguments, without labels.
        labels: (b, t), -100 where nothing is trained on; those of position 0 are never trained on.
        label_smoothing: share of the target spread over the vocabulary.

    Raises:
        LoRAError: with gradients on, no label is trained on; or labels do not fit.
    """
    shifted = torch.full_like(labels, IGNORED)
    shifted[:, :-1] = labels[:, 1:]
    return aligned_loss(backbone, inputs, shifted, label_smoothing=label_smoothing)


def aligned_loss(
    backbone: nn.Module, inputs: Mapping[str, Any], labels: Tensor, *, label_smoothing: float = 0.0
) -> LinearCrossEntropy:
    """The same without the shift: the output at position t is held to the label at t."""
    if torch.is_grad_enabled() and not bool((labels != IGNORED).any()):
        raise LoRAError(
            f"nothing is trained on in this batch: all {labels.numel()} labels, shifted to the token before them where"
            f" the task predicts the next, are {IGNORED}; drop such examples, or let more of each be kept (max_length)"
        )
    return _plain(logits_of(backbone(**inputs)), labels, label_smoothing)


def _plain(logits: Tensor, labels: Tensor, label_smoothing: float) -> LinearCrossEntropy:
    """From logits (b, t, V) that are there."""
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise LoRAError(
            f"labels {tuple(labels.shape)} need logits (*{tuple(labels.shape)}, V), got {tuple(logits.shape)}"
        )
    rows = labels != IGNORED
    trained, chosen = labels[rows], logits[rows]
    refuse_labels(trained, logits.shape[-1], IGNORED)
    loss = nn.functional.cross_entropy(
        chosen.to(wide_dtype(chosen)), trained, reduction="sum", label_smoothing=label_smoothing
    )
    return LinearCrossEntropy(loss, len(trained), (chosen.argmax(-1) == trained).sum())
