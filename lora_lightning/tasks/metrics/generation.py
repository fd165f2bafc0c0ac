"""Metrics of tokens, and of generated texts against references, such as BLEU, with states that are summed.

Those of texts are between 0 and 1, where the literature often uses percent. They are updated with n texts and n lists
of references, of one or more texts each.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.functional.text import rouge_score
from torchmetrics.text import CHRFScore, SacreBLEUScore, TranslationEditRate

from lora_lightning.lora.errors import LoRAError, did_you_mean


class Perplexity(MeanMetric):
    """`exp` of the mean loss over all tokens, `update(mean loss, tokens)`; NaN without tokens."""

    higher_is_better = False  # type: ignore[assignment]

    def compute(self) -> Tensor:
        return super().compute().exp()


class TokenAccuracy(Metric):
    """Share of tokens whose largest logit is the label's, `update(right ones, tokens)`; NaN without tokens."""

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
        return self.correct / self.tokens


class Rouge(MeanMetric):
    """The mean over texts of ROUGE's F measure with the nearest reference (Lin 2004, aclanthology.org/W04-1013).

    Words are lower-cased runs of a-z and 0-9, not stemmed, as in Google's `rouge_score`. The state is a sum and a count
    in place of torchmetrics' list of scores, so that the mean over processes is exact and cheap.

    Args:
        key: `rouge1`, `rouge2`, ... by n-grams; `rougeL` by the longest common subsequence; `rougeLsum` by that of each
            sentence, which nltk finds.
    """

    higher_is_better = True  # type: ignore[assignment]

    def __init__(self, key: str) -> None:
        super().__init__()
        if key == "rougeLsum" and importlib.util.find_spec("nltk") is None:
            raise LoRAError("rougeLsum finds sentences with nltk: pip install 'lora_lightning[text-metrics]'")
        self.key = key

    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:  # type: ignore[override]
        for text, targets in zip(texts, references, strict=True):
            super().update(rouge_score([text], [list(targets)], rouge_keys=self.key)[f"{self.key}_fmeasure"])


class ExactMatch(MeanMetric):
    """The share of texts that are one of their references, blanks at both ends aside."""

    higher_is_better = True  # type: ignore[assignment]

    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:  # type: ignore[override]
        for text, targets in zip(texts, references, strict=True):
            super().update(float(text.strip() in {reference.strip() for reference in targets}))


METRICS: dict[str, Callable[[], Metric]] = {
    "bleu": SacreBLEUScore,
    "chrf": CHRFScore,
    "ter": TranslationEditRate,
    "rouge1": lambda: Rouge("rouge1"),
    "rouge2": lambda: Rouge("rouge2"),
    "rougeL": lambda: Rouge("rougeL"),
    "rougeLsum": lambda: Rouge("rougeLsum"),
    "exact_match": ExactMatch,
}
"""By name: corpus BLEU with sacrebleu's 13a tokens (Post 2018), unsmoothed; chrF++; TER, where less is better; ROUGE;
and exact match."""
LESS_IS_BETTER = frozenset({"ter"})


def generation_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """The metrics with these names; an unknown name and a missing package raise a LoRAError."""
    for name in names:
        if name not in METRICS:
            raise LoRAError(f"metrics: no '{name}'{did_you_mean(name, list(METRICS))}; known: {', '.join(METRICS)}")
    return {name: METRICS[name]() for name in names}
