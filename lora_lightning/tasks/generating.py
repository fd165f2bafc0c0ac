"""What tasks that write texts have in common: a loss over tokens in training, and texts beside it in evaluation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from transformers import PreTrainedTokenizerBase

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import Stage, StepOutput, Task
from lora_lightning.tasks.generation import check_options, generate_texts
from lora_lightning.tasks.losses.token_loss import IGNORED, LinearCrossEntropy
from lora_lightning.tasks.metrics.generation import LESS_IS_BETTER, generation_metrics
from lora_lightning.tasks.metrics.tokens import TokenAccuracy

METRICS = ("bleu", "rouge1", "rouge2", "rougeL", "exact_match")


@dataclass
class WrittenOutput(StepOutput):
    """A batch's loss over target tokens, and in evaluation what was written for it."""

    correct: Tensor | None = None
    """Of `weight` target tokens, how many have the largest logit."""
    texts: list[str] = field(default_factory=list)
    references: list[list[str]] = field(default_factory=list)
    """Of each text, what it might have been."""


class GeneratingTask(Task):
    """Teacher-forced cross-entropy; in validation and test also texts, held to their references.

    Args:
        tokenizer: which the texts are read with. The data's own by default.
        generation: options of transformers' `generate` by name, such as num_beams, max_new_tokens, length_penalty and
            no_repeat_ngram_size. By default greedy, of at most 64 tokens.
        metrics: of bleu, chrf, ter, rouge1, rouge2, rougeL, rougeLsum and exact_match. The first says which checkpoint
            is best.
        label_smoothing: share of the target spread over the vocabulary, in training alone.
        generate_in_validation: whether validation writes texts; without, the best checkpoint has the least loss, and
            only test and predict write.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        generation: dict[str, Any] | None = None,
        metrics: Sequence[str] = METRICS,
        label_smoothing: float = 0.0,
        generate_in_validation: bool = True,
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise LoRAError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        # Each is updated by itself, so torchmetrics must not take two for one.
        written = generation_metrics(metrics)
        super().__init__(MetricCollection({"token_accuracy": TokenAccuracy(), **written}, compute_groups=False))
        self.written = tuple(written)
        self.tokenizer, self.label_smoothing = tokenizer, label_smoothing
        self.generation = check_options(generation)
        self.generate_in_validation = generate_in_validation
        self._stage: Stage = "test"
        if metrics and generate_in_validation:
            self.monitor = f"val/{metrics[0]}"
            self.monitor_mode = "min" if metrics[0] in LESS_IS_BETTER else "max"

    @abstractmethod
    def token_loss(self, backbone: nn.Module, batch: Mapping[str, Any], label_smoothing: float) -> LinearCrossEntropy:
        """The sum of the loss over target tokens, their number, and how many of them are guessed."""

    @abstractmethod
    def sources(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What `generate` goes on from, a row for each of the batch's."""

    def step(self, backbone: nn.Module, batch: Mapping[str, Any]) -> WrittenOutput:
        return self._counted(self.token_loss(backbone, batch, self.label_smoothing))

    def evaluate(self, backbone: nn.Module, batch: Mapping[str, Any]) -> WrittenOutput:
        """The loss over all targets, unsmoothed; and one text for each row that has references.

        `references` holds a list of texts for each row. Data with several targets to a source give one of its rows all
        of them, and the others none, so that a source is written for once. Without the entry each row has its target.
        """
        out = self._counted(self.token_loss(backbone, batch, 0.0))
        if not self.writes(self._stage):
            return out
        references = batch.get("references") or [[text] for text in self._targets(batch["labels"])]
        rows = [i for i, own in enumerate(references) if own]
        if rows:
            sources = {key: value[rows] for key, value in self.sources(batch).items()}
            out.texts = generate_texts(backbone, sources, self.tokenizer, self.generation)
            out.references = [list(references[i]) for i in rows]
        return out

    @torch.no_grad()
    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The text that is written for each row."""
        return {"prediction": generate_texts(backbone, self.sources(batch), self.tokenizer, self.generation)}

    def writes(self, stage: Stage) -> bool:
        """Whether this stage writes texts: `test` or `val`, or a further set of one of them."""
        kind = stage.partition("_")[0]
        return kind == "test" or (kind == "val" and self.generate_in_validation)

    def reset(self, stage: Stage) -> None:
        """Start counting anew; the stage that begins also says whether `evaluate` writes."""
        super().reset(stage)
        self._stage = stage

    def update(self, stage: Stage, out: StepOutput) -> dict[str, Any]:
        assert isinstance(out, WrittenOutput)
        metrics = self.metrics[f"{stage}_"]
        assert isinstance(metrics, MetricCollection)
        if out.correct is not None:
            metrics["token_accuracy"].update(out.correct, out.weight)
        for name in self.written if out.texts else ():
            metrics[name].update(out.texts, out.references)
        shown = self.logged(stage)
        return {name: metric for name, metric in super().update(stage, out).items() if name in shown}

    def logged(self, stage: Stage) -> list[str]:
        """Without figures of texts that the stage does not write."""
        silent = set() if self.writes(stage) else {f"{stage}/{name}" for name in self.written}
        return [name for name in super().logged(stage) if name not in silent]

    def _counted(self, out: LinearCrossEntropy) -> WrittenOutput:
        return WrittenOutput(loss=out.loss / max(out.count, 1), weight=out.count, correct=out.correct)

    def _targets(self, labels: Tensor) -> list[str]:
        kept = [[token for token in row if token != IGNORED] for row in labels.tolist()]
        return [text.strip() for text in self.tokenizer.batch_decode(kept, skip_special_tokens=True)]
