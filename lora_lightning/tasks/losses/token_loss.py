"""What a batch's tokens cost: the parts that every way of computing it shares."""

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
    """What a batch's tokens cost, and how many were guessed."""

    loss: Tensor
    """The sum over trained rows, a scalar in float32 or wider."""
    count: int  # type: ignore[assignment]  # a tuple's own `count` is not missed
    """How many rows are trained on."""
    correct: Tensor
    """Of them, how many have their largest logit at the label; a scalar of whole numbers."""


class Terms(NamedTuple):
    """What turns `W h + b` into logits and logits into a loss."""

    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0


def cross_entropy_of_logits(logits: Tensor, labels: Tensor, terms: Terms) -> LinearCrossEntropy:
    """The plain way, from `W h + b` (n, V) and labels (n,) of which none is left out."""
    refuse_labels(labels, logits.shape[-1])
    z = with_terms(logits.to(wide_dtype(logits)), terms)
    loss = F.cross_entropy(z, labels, reduction="sum", label_smoothing=terms.label_smoothing)
    return LinearCrossEntropy(loss, len(labels), (z.argmax(-1) == labels).sum())


def with_terms(logits: Tensor, terms: Terms) -> Tensor:
    """`cap tanh(scale z / cap)`."""
    scaled = logits if terms.logit_scale == 1.0 else logits * terms.logit_scale
    return scaled if terms.softcap is None else torch.tanh(scaled / terms.softcap) * terms.softcap


def refuse_labels(trained: Tensor, vocabulary: int, ignore_index: int = IGNORED) -> None:
    """Raise a LoRAError where one of these labels is none of the head's entries."""
    if not len(trained):
        return
    low, high = torch.stack(trained.aminmax()).tolist()
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise LoRAError(
            f"label {wrong} is outside of the head's {vocabulary} entries: labels are 0 to {vocabulary - 1}, or"
            f" {ignore_index} where nothing is trained on"
        )
