"""Cross-entropy through a head that is more than one frozen product: adapted, trained as a copy, or quantized."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_lightning.tasks.losses.linear_cross_entropy import rows_at_once
from lora_lightning.tasks.losses.token_loss import LinearCrossEntropy, Terms, cross_entropy_of_logits


def module_cross_entropy(
    head: nn.Module, hidden: Tensor, labels: Tensor, vocabulary: int, terms: Terms
) -> LinearCrossEntropy:
    """The head's own forward in chunks of rows, whose logits backward makes again, with the dropout that they had.

    Args:
        head: (1, n, d) to (1, n, V).
        hidden: (n, d).
        labels: (n,), of which none is left out.
        vocabulary: V, for the size of the chunks.
        terms: what becomes of the head's logits.
    """

    def of(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = cross_entropy_of_logits(head(h.unsqueeze(0)).squeeze(0), y, terms)
        return out.loss, out.correct

    size = rows_at_once(hidden, vocabulary)
    chunks = zip(torch.split(hidden, size), torch.split(labels, size), strict=True)
    if torch.is_grad_enabled():
        parts = [checkpoint(of, h, y, use_reentrant=False) for h, y in chunks]
    else:
        parts = [of(h, y) for h, y in chunks]
    losses, hits = zip(*parts, strict=True)
    return LinearCrossEntropy(torch.stack(losses).sum(), len(labels), torch.stack(hits).sum())
