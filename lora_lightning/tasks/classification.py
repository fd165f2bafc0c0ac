"""What classifying has in common, whatever is classified."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import logits_of


def class_logits(output: Any, num_classes: int) -> Tensor:
    """Logits (n, num_classes) out of a backbone's output.

    Raises:
        LoRAError: there are none, or not one for each class.
    """
    logits = logits_of(output)
    if logits.dim() != 2 or logits.shape[1] != num_classes:
        raise LoRAError(
            f"the backbone must return logits (n, {num_classes}), one for each class, got"
            f" {tuple(logits.shape)}: give its head {num_classes} outputs"
        )
    return logits


def checked_count(num_classes: int) -> int:
    """The number of classes, which must be 2 or more."""
    if num_classes < 2:
        raise LoRAError(f"classification needs at least 2 classes, got {num_classes}")
    return num_classes
