"""Preference tuning: makes chosen answers more probable than rejected ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.inject import disabled
from lora_lightning.tasks.base import StepOutput, Task, inputs_and_labels
from lora_lightning.tasks.losses.preference_losses import (
    REFERENCE_FREE,
    LogProbs,
    Pairs,
    PreferenceLoss,
    PreferenceTerms,
    check_terms,
    preference_losses,
    sequence_log_probs,
)
from lora_lightning.tasks.positions import in_evaluation


class PreferenceTuning(Task):
    """DPO and similar losses; the reference is the same model with its adapter switched off.

    The formulas are in `preference_losses.py`. An answer's reward is `beta` times its log-probability over the
    reference's; `accuracy` is the share of pairs whose chosen answer has the higher reward, `margin` the mean
    difference. The reference is computed without gradients and without dropout, and by the original of a module in
    `modules_to_save`.

    Args:
        loss: sigmoid (DPO), robust, hinge, ipo, or, without a reference, simpo and orpo.
        beta: strength of the pull to the reference. DPO takes 0.1 (or 0.01 for longer training), SimPO 2 to 10; in
            orpo it weighs the odds ratio, 0.1 in its paper.
        label_smoothing: assumed share of pairs with swapped labels, below 0.5; for sigmoid, robust and simpo.
        gamma: simpo's margin between the rewards.
        rpo_alpha: weight of the chosen answer's likelihood per token, which keeps it from falling (arXiv 2404.19733).

    Raises:
        LoRAError: a term has an invalid value, or no meaning in the loss.
    """

    peft_task_type = "CAUSAL_LM"

    def __init__(
        self,
        loss: PreferenceLoss = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        gamma: float = 0.5,
        rpo_alpha: float = 0.0,
    ) -> None:
        terms = check_terms(PreferenceTerms(loss, beta, label_smoothing, gamma, rpo_alpha))
        metrics = {
            "accuracy": MeanOf(torch.gt),
            "margin": MeanOf(torch.sub),
            "chosen_reward": MeanOf(_first),
            "rejected_reward": MeanOf(_second),
        }
        # Not in groups: before the first step all rewards are 0, and metrics with equal states would be merged.
        super().__init__(MetricCollection(dict(metrics), compute_groups=False))
        self.terms = terms

    def step(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """`batch` has the backbone's keyword arguments for 2n texts and `labels` (2n, t), the chosen n first.

        Labels are the answers' tokens, and -100 at prompts and padding.
        """
        pairs = self._pairs(backbone, batch)
        return StepOutput(
            loss=pairs.loss.mean(),
            weight=len(pairs.loss),
            predictions=pairs.chosen_reward,
            targets=pairs.rejected_reward,
        )

    def examples(self, batch: Any) -> int:
        """The number of pairs."""
        return super().examples(batch) // 2

    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Rewards (n,) of both answers, and whether the first is preferred (n,)."""
        pairs = self._pairs(backbone, batch)
        return {
            "chosen_preferred": pairs.chosen_reward > pairs.rejected_reward,
            "chosen_reward": pairs.chosen_reward,
            "rejected_reward": pairs.rejected_reward,
        }

    def _pairs(self, backbone: nn.Module, batch: Mapping[str, Any]) -> Pairs:
        inputs, labels = inputs_and_labels(batch)
        _check_labels(labels)
        policy = sequence_log_probs(backbone, inputs, labels)
        reference: LogProbs | None = None
        if self.terms.loss not in REFERENCE_FREE:
            with without_gradients(backbone):
                reference = sequence_log_probs(backbone, inputs, labels)
        return preference_losses(policy, reference, self.terms)


@contextmanager
def without_gradients(backbone: nn.Module) -> Iterator[None]:
    """Within the block the model is the frozen reference: adapter off, in eval mode, without gradients."""
    with in_evaluation(backbone), torch.no_grad(), disabled(backbone):
        yield


class MeanOf(MeanMetric):
    """The mean over pairs of a function of their rewards."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def update(self, chosen: Tensor, rejected: Tensor) -> None:  # type: ignore[override]
        """Add the rewards (n,) of n pairs."""
        super().update(self.function(chosen, rejected))


def _first(chosen: Tensor, rejected: Tensor) -> Tensor:
    return chosen


def _second(chosen: Tensor, rejected: Tensor) -> Tensor:
    return rejected


def _check_labels(labels: Tensor) -> None:
    """Raise unless there is an even number of texts, each with a token that counts."""
    if labels.dim() != 2 or len(labels) % 2 or not len(labels):
        raise LoRAError(
            f"labels must be (2n, t), the chosen answers first and the rejected after them, got {tuple(labels.shape)}"
        )
    empty = (labels[:, 1:] == -100).all(1).nonzero().flatten().tolist()
    if empty:
        half = len(labels) // 2
        which = "chosen" if empty[0] < half else "rejected"
        raise LoRAError(f"the {which} answer of pair {empty[0] % half + 1} in this batch has no token that counts")
