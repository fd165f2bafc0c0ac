"""Metrics of generated texts against references, such as BLEU: torchmetrics with states that are summed.

All are between 0 and 1, where the literature often uses percent. They are updated with n texts and n lists of
references, of one or more texts each.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.text import rouge_score
from torchmetrics.text import CHRFScore, SacreBLEUScore, TranslationEditRate

from lora_lightning.lora.errors import LoRAError, did_you_mean


class Rouge(Metric):
    """The mean over texts of ROUGE's F measure with the nearest reference (Lin 2004, aclanthology.org/W04-1013).

    Words are lower-cased runs of a-z and 0-9, not stemmed, as in Google's `rouge_score`. The state is a sum and a count
    in place of torchmetrics' list of scores, so that the mean over processes is exact and cheap.

    Args:
        key: `rouge1`, `rouge2`, ... by n-grams; `rougeL` by the longest common subsequence; `rougeLsum` by that of each
            sentence, which nltk finds.

    Raises:
        LoRAError: `rougeLsum` without nltk and its list of abbreviations.
    """

    full_state_update = False
    higher_is_better = True

    total: Tensor
    count: Tensor

    def __init__(self, key: str) -> None:
        super().__init__()
        if key == "rougeLsum":
            _need_nltk()
        self.key = key
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        for text, targets in zip(texts, references, strict=True):
            score = rouge_score([text], [list(targets)], rouge_keys=self.key)
            self.total += score[f"{self.key}_fmeasure"].to(self.total.device)
        self.count += len(texts)

    def compute(self) -> Tensor:
        return self.total / self.count


class ExactMatch(Metric):
    """The share of texts that are one of their references, blanks at both ends aside."""

    full_state_update = False
    higher_is_better = True

    matches: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("matches", "count"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        pairs = zip(texts, references, strict=True)
        self.matches += sum(text.strip() in {reference.strip() for reference in targets} for text, targets in pairs)
        self.count += len(texts)

    def compute(self) -> Tensor:
        return self.matches / self.count


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
    """The metrics with these names.

    Raises:
        LoRAError: a name is unknown, or a metric's package is missing.
    """
    for name in names:
        if name not in METRICS:
            raise LoRAError(f"metrics: no '{name}'{did_you_mean(name, list(METRICS))}; known: {', '.join(METRICS)}")
    return {name: METRICS[name]() for name in names}


def _need_nltk() -> None:
    expected = (
        "rougeLsum finds sentences with nltk: pip install 'lora_lightning[text-metrics]', then once"
        " python -c \"import nltk; nltk.download('punkt_tab')\""
    )
    if importlib.util.find_spec("nltk") is None:
        raise LoRAError(expected)
    import nltk  # type: ignore[import-untyped]

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise LoRAError(f"{expected} (its data punkt_tab is not there)") from error
