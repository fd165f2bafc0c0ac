"""Metrics over tokens, from a batch's mean loss and its number of right predictions, without logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric


class Perplexity(MeanMetric):
    """`exp` of the mean loss over all tokens; `update(mean loss, tokens)`."""

    higher_is_better = False  # type: ignore[assignment]

    def compute(self) -> Tensor:
        """The perplexity; NaN without tokens."""
        return super().compute().exp()


class TokenAccuracy(Metric):
    """Share of tokens whose largest logit is the label's; `update(right ones, tokens)`."""

    full_state_update = False
    higher_is_better = True
    correct: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("correct", "tokens"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, correct: Tensor, tokens: int) -> None:
        self.correct += correct.to(self.correct.device)
        self.tokens += tokens

    def compute(self) -> Tensor:
        """The share; NaN without tokens."""
        return self.correct / self.tokens
