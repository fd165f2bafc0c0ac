"""Next-token prediction for causal language models, such as GPT-2 and Llama."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import Stage, StepOutput, Task, inputs_of
from lora_lightning.tasks.losses.lm_head import shifted_loss, shifted_losses
from lora_lightning.tasks.metrics.tokens import Perplexity, TokenAccuracy
from lora_lightning.tasks.positions import as_packed, is_packed, unpack


@dataclass
class TokensOutput(StepOutput):
    """The result of a batch of texts; `weight` is its number of trained tokens."""

    correct: Tensor | None = None
    """Number of these that have the largest logit."""


class CausalLM(Task):
    """Cross-entropy of each token given those before it; perplexity and the share of tokens predicted right.

    Perplexity is `exp(sum of -log p / number of trained tokens)`, over all tokens of a stage and of all processes.

    Args:
        label_smoothing: share of the target spread over the vocabulary, in training alone.
    """

    monitor = "val/loss"
    monitor_mode = "min"
    peft_task_type = "CAUSAL_LM"

    def __init__(self, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise LoRAError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        # Each is updated separately, so torchmetrics must not merge equal states.
        metrics = {"perplexity": Perplexity(), "token_accuracy": TokenAccuracy()}
        super().__init__(MetricCollection(dict(metrics), compute_groups=False))
        self.label_smoothing = label_smoothing
        if label_smoothing:  # the exp of a smoothed loss is no perplexity
            del self.metrics["train_"]["perplexity"]  # type: ignore[operator]

    def step(self, backbone: nn.Module, batch: Mapping[str, Any]) -> TokensOutput:
        """`batch` has the backbone's keyword arguments and `labels` (b, t), -100 where nothing is trained on.

        With `position_ids` and no `attention_mask` its rows are packed: documents that restart at position 0.

        Raises:
            LoRAError: nothing is trained on; or the rows are packed and the backbone mixes documents.
        """
        return self._step(backbone, batch, self.label_smoothing)

    def inputs(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The backbone's arguments; a packed batch is unpacked into rows of one document."""
        inputs = inputs_of(batch, "labels", "document")
        return unpack(inputs) if is_packed(inputs) else inputs

    def evaluate(self, backbone: nn.Module, batch: Mapping[str, Any]) -> TokensOutput:
        """The step without smoothing."""
        return self._step(backbone, batch, 0.0)

    def _step(self, backbone: nn.Module, batch: Mapping[str, Any], label_smoothing: float) -> TokensOutput:
        inputs, labels = inputs_and_labels(backbone, batch)
        out = shifted_loss(backbone, inputs, labels, label_smoothing=label_smoothing)
        return TokensOutput(loss=out.loss / max(out.count, 1), weight=out.count, correct=out.correct)

    def update(self, stage: Stage, out: StepOutput) -> dict[str, Any]:
        metrics = self.metrics[f"{stage}_"]
        assert isinstance(metrics, MetricCollection)
        if out.weight and isinstance(out, TokensOutput):
            if "perplexity" in metrics.keys(keep_base=True):
                metrics["perplexity"].update(out.loss.detach(), out.weight)
            metrics["token_accuracy"].update(out.correct, out.weight)
        return super().update(stage, out)

    @torch.no_grad()
    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """For each row the mean loss over its tokens but the first, their number, and the perplexity.

        A row without such tokens has NaN for both. `document` is included where the batch has it.
        """
        inputs, labels = inputs_and_labels(backbone, batch)
        parts = shifted_losses(backbone, inputs, labels)
        tokens = torch.tensor([part.count for part in parts], device=labels.device)
        loss = torch.stack([part.loss for part in parts]).to(labels.device) / tokens
        document = {"document": batch["document"]} if "document" in batch else {}
        return {**document, "loss": loss, "tokens": tokens, "perplexity": loss.exp()}


def inputs_and_labels(backbone: nn.Module, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """The backbone's arguments, and the labels (b, t).

    Raises:
        LoRAError: there are no labels, or the rows are packed and the backbone mixes documents.
    """
    inputs = inputs_of(batch, "labels", "document")
    if not isinstance(batch.get("labels"), Tensor):
        raise LoRAError(
            f"the batch has no 'labels', only {', '.join(inputs)}: for a language model they are the input_ids"
            " themselves, -100 where nothing is trained on"
        )
    return (as_packed(backbone, inputs) if is_packed(inputs) else inputs), batch["labels"]
