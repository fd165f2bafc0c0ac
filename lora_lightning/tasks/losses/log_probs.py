"""The log-probability of each text's trained tokens, without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.layers.functional import wide_dtype
from lora_lightning.tasks.base import logits_of
from lora_lightning.tasks.losses.linear_cross_entropy import in_chunks
from lora_lightning.tasks.losses.lm_head import before_head
from lora_lightning.tasks.losses.token_loss import IGNORED, Terms, refuse_labels, with_terms


class LogProbs(NamedTuple):
    """Log-probabilities of each text of a batch."""

    total: Tensor
    """(b,): `sum_t log p(y_t | y_<t)` over trained tokens, in float32 or wider."""
    tokens: Tensor
    """(b,): number of trained tokens."""

    @property
    def mean(self) -> Tensor:
        """(b,): mean over trained tokens; 0 without any."""
        return self.total / self.tokens.clamp(min=1)


def sequence_log_probs(backbone: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> LogProbs:
    """Log-probabilities of the tokens that have a label, each given all before it.

    Logits are computed only for the trained tokens, in chunks, and recomputed in backward.

    Args:
        backbone: returns logits (b, t, V).
        inputs: its keyword arguments, without labels.
        labels: (b, t), -100 where a token does not count; those of position 0 never do, as nothing predicts them.

    Raises:
        LoRAError: labels do not fit the inputs or the head.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    before = before_head(backbone, inputs)
    states = logits_of(backbone(**inputs)) if before is None else before.hidden
    if states.dim() != 3 or states.shape[:2] != targets.shape:
        raise LoRAError(
            f"labels {tuple(labels.shape)} need one row of the model's states each, got {tuple(states.shape)}: inputs"
            " and labels must be of one length"
        )
    targets = targets.to(states.device)
    trained = targets != IGNORED
    if before is None:
        each = _of_logits(states[trained], targets[trained], Terms())
    else:
        of_logits = partial(_of_logits, terms=before.terms)
        each = torch.cat(in_chunks(before.head, states[trained], targets[trained], before.vocabulary, of_logits))
    text = trained.nonzero()[:, 0]
    total = torch.zeros(len(labels), dtype=each.dtype, device=each.device).index_add(0, text, each)
    return LogProbs(total, trained.sum(1))


def _of_logits(logits: Tensor, labels: Tensor, terms: Terms) -> Tensor:
    refuse_labels(labels, logits.shape[-1])
    z = with_terms(logits.to(wide_dtype(logits)), terms)
    return -F.cross_entropy(z, labels, reduction="none")
