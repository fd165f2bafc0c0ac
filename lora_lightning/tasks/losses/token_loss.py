"""The parts of a token loss that all ways of computing it share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.layers.functional import wide_dtype

IGNORED = -100
"""The label of tokens that are not trained on, as in torch and transformers."""


class LinearCrossEntropy(NamedTuple):
    """The loss of a batch's tokens, and the number of right predictions."""

    loss: Tensor
    """The sum over trained rows, a scalar in float32 or wider."""
    count: int  # type: ignore[assignment]  # it replaces tuple's method `count`
    """Number of trained rows."""
    correct: Tensor
    """Number of these whose largest logit is the label's; an integer scalar."""


class Terms(NamedTuple):
    """Parameters that turn `W h + b` into logits and logits into a loss."""

    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0


def cross_entropy_of_logits(logits: Tensor, labels: Tensor, terms: Terms) -> LinearCrossEntropy:
    """The loss from `W h + b` (n, V) and labels (n,), all valid."""
    refuse_labels(labels, logits.shape[-1])
    z = with_terms(logits.to(wide_dtype(logits)), terms)
    loss = F.cross_entropy(z, labels, reduction="sum", label_smoothing=terms.label_smoothing)
    return LinearCrossEntropy(loss, len(labels), (z.argmax(-1) == labels).sum())


def with_terms(logits: Tensor, terms: Terms) -> Tensor:
    """The logits `cap tanh(scale z / cap)`."""
    scaled = logits if terms.logit_scale == 1.0 else logits * terms.logit_scale
    return scaled if terms.softcap is None else torch.tanh(scaled / terms.softcap) * terms.softcap


def refuse_labels(trained: Tensor, vocabulary: int, ignore_index: int = IGNORED) -> None:
    """Raise a LoRAError for a label outside of the head's entries."""
    if not len(trained):
        return
    low, high = torch.stack(trained.aminmax()).tolist()
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise LoRAError(
            f"label {wrong} is outside of the head's {vocabulary} entries: labels are 0 to {vocabulary - 1}, or"
            f" {ignore_index} where nothing is trained on"
        )
