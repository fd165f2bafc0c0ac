"""Preference tuning: makes chosen answers more probable than rejected ones, by DPO and similar losses.

With h = [log p(y_w) - log p_ref(y_w)] - [log p(y_l) - log p_ref(y_l)] of the chosen answer y_w and the rejected y_l,
means over an answer's tokens under a bar, s the logistic function, b = beta and e = label_smoothing:

    sigmoid   -(1 - e) log s(b h) - e log s(-b h)                       DPO, arXiv 2305.18290; e > 0: conservative DPO
    robust    [-(1 - e) log s(b h) + e log s(-b h)] / (1 - 2 e)         arXiv 2403.00409
    hinge     max(0, 1 - b h)                                           SLiC, arXiv 2305.10425
    ipo       (h' - 1 / (2 b))^2, h' from means over tokens             arXiv 2310.12036; its authors' normalisation
    simpo     -(1 - e) log s(d) - e log s(-d), d = b (bar_w - bar_l) - gamma           arXiv 2405.14734; no reference
    orpo      -bar_w - b log s(log odds_w - log odds_l), log odds = bar - log(1 - exp bar)   arXiv 2403.07691; none
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric, MetricCollection

from lora_lightning.lora.errors import LoRAError, refuse_unknown
from lora_lightning.lora.inject import disabled
from lora_lightning.tasks.base import StepOutput, Task, labels_of
from lora_lightning.tasks.losses.linear_cross_entropy import IGNORED, refuse_labels, rows_at_once
from lora_lightning.tasks.losses.lm_head import before_head, shift_labels
from lora_lightning.tasks.positions import in_evaluation


class PreferenceTuning(Task):
    """DPO and similar losses; the reference is the same model with its adapter switched off.

    The formulas are at the head of its file. An answer's reward is `beta` times its log-probability over the
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
        terms = PreferenceTerms(loss, beta, label_smoothing, gamma, rpo_alpha)
        # Not in groups: before the first step all rewards are 0, and metrics with equal states would be merged.
        super().__init__(MetricCollection({name: MeanMetric() for name in FIGURES}, compute_groups=False))
        self.terms = terms

    def step(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """`batch` has the backbone's keyword arguments for 2n texts and `labels` (2n, t), the chosen n first.

        Labels are the answers' tokens, and -100 at prompts and padding.
        """
        loss, chosen, rejected = self._pairs(backbone, batch)
        figures = (chosen > rejected).float(), chosen - rejected, chosen, rejected
        updates = {name: (figure,) for name, figure in zip(FIGURES, figures, strict=True)}
        return StepOutput(loss=loss.mean(), weight=len(loss), updates=dict(updates))

    def examples(self, batch: Any) -> int:
        """The number of pairs."""
        return super().examples(batch) // 2

    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Rewards (n,) of both answers, and whether the first is preferred (n,)."""
        _, chosen, rejected = self._pairs(backbone, batch)
        return {"chosen_preferred": chosen > rejected, "chosen_reward": chosen, "rejected_reward": rejected}

    def _pairs(self, backbone: nn.Module, batch: Mapping[str, Any]) -> Pairs:
        inputs, labels = self.inputs(backbone, batch), labels_of(batch)
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


FIGURES = ("accuracy", "margin", "chosen_reward", "rejected_reward")
"""The metrics, each a mean over pairs."""
PreferenceLoss = Literal["sigmoid", "robust", "hinge", "ipo", "simpo", "orpo"]
REFERENCE_FREE = ("simpo", "orpo")
OF_MEANS = ("ipo", "simpo", "orpo")
"""Losses that take the mean over an answer's tokens and not the sum."""


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
    """
    found = before_head(backbone, inputs)
    targets = found.aligned(shift_labels(labels))
    trained = targets != IGNORED
    states, tokens = found.hidden[trained], targets[trained]
    refuse_labels(tokens, found.vocabulary)

    def log_probs(h: Tensor, y: Tensor) -> Tensor:
        return -F.cross_entropy(found.logits(h), y, reduction="none")

    size = rows_at_once(states, found.vocabulary)
    chunks = zip(torch.split(states, size), torch.split(tokens, size), strict=True)
    each = torch.cat([checkpoint(log_probs, h, y, use_reentrant=False) for h, y in chunks])
    total = torch.zeros(len(labels), dtype=each.dtype, device=each.device).index_add(0, trained.nonzero()[:, 0], each)
    return LogProbs(total, trained.sum(1))


@dataclass(frozen=True)
class PreferenceTerms:
    """Parameters of a loss; an invalid one raises a LoRAError."""

    loss: PreferenceLoss
    beta: float
    label_smoothing: float = 0.0
    gamma: float = 0.5
    rpo_alpha: float = 0.0

    def __post_init__(self) -> None:
        refuse_unknown("loss", self.loss, get_args(PreferenceLoss))
        if not self.beta > 0:
            raise LoRAError(f"beta must be above 0, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise LoRAError(
                f"label_smoothing is the share of wrong pairs, at least 0 and below 0.5, got {self.label_smoothing}"
            )
        if self.label_smoothing and self.loss not in ("sigmoid", "robust", "simpo"):
            raise LoRAError(f"label_smoothing has no meaning in the loss {self.loss}: leave it at 0")
        if self.rpo_alpha < 0:
            raise LoRAError(f"rpo_alpha is a weight, at least 0, got {self.rpo_alpha}")
        if self.rpo_alpha and self.loss == "orpo":
            raise LoRAError("orpo has the chosen answer's own likelihood in it already: leave rpo_alpha at 0")


class Pairs(NamedTuple):
    """Loss and rewards of each pair."""

    loss: Tensor
    """(n,)."""
    chosen_reward: Tensor
    """(n,): `beta` times the log-probability of the chosen answer over the reference's, without gradient."""
    rejected_reward: Tensor
    """(n,): the same for the rejected answer."""


def preference_losses(policy: LogProbs, reference: LogProbs | None, terms: PreferenceTerms) -> Pairs:
    """Losses and rewards of n pairs.

    `rpo_alpha` adds that weight times the chosen answer's negative log-likelihood per token (arXiv 2404.19733).

    Args:
        policy: of 2n answers, the chosen ones first, under the model that trains.
        reference: the same under the frozen one; None for the losses that need none.
        terms: of the loss.
    """
    policy_scores = policy.mean if terms.loss in OF_MEANS else policy.total
    if reference is not None:
        policy_scores = policy_scores - (reference.mean if terms.loss in OF_MEANS else reference.total)
    chosen, rejected = policy_scores.chunk(2)
    loss = _loss(chosen, rejected, terms)
    if terms.rpo_alpha:
        loss = loss - terms.rpo_alpha * policy.mean.chunk(2)[0]
    return Pairs(loss, terms.beta * chosen.detach(), terms.beta * rejected.detach())


def _loss(chosen: Tensor, rejected: Tensor, terms: PreferenceTerms) -> Tensor:
    h, e = terms.beta * (chosen - rejected), terms.label_smoothing
    if terms.loss == "hinge":
        return torch.relu(1 - h)
    if terms.loss == "ipo":
        return (chosen - rejected - 1 / (2 * terms.beta)).square()
    if terms.loss == "orpo":
        odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
        return -chosen - terms.beta * F.logsigmoid(odds)
    if terms.loss == "robust":
        return (-(1 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1 - 2 * e)
    if terms.loss == "simpo":
        h = h - terms.gamma
    return -(1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h)


def _log1mexp(x: Tensor) -> Tensor:
    """`log(1 - exp x)` for x <= 0, without cancellation; bounded where p is 1 to rounding."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -0.6931471805599453  # log 2: above it expm1 is exact, below log1p is
    return torch.where(near, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
