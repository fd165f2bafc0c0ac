"""Next-token prediction for causal language models, such as GPT-2 and Llama."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection

from lora_lightning.tasks.base import StepOutput, Task, inputs_of, labels_of, refuse_smoothing
from lora_lightning.tasks.losses.linear_cross_entropy import LinearCrossEntropy
from lora_lightning.tasks.losses.lm_head import shifted_loss, shifted_losses
from lora_lightning.tasks.positions import as_packed, is_packed, unpack


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


class TokenTask(Task):
    """Cross-entropy of tokens, the mean over all of a stage, and the share of them predicted right."""

    def __init__(self, label_smoothing: float, metrics: Mapping[str, Metric]) -> None:
        refuse_smoothing(label_smoothing)
        # Each is updated separately, so torchmetrics must not merge equal states.
        super().__init__(MetricCollection({"token_accuracy": TokenAccuracy(), **metrics}, compute_groups=False))
        self.label_smoothing = label_smoothing

    @abstractmethod
    def token_loss(self, backbone: nn.Module, batch: Mapping[str, Any], label_smoothing: float) -> LinearCrossEntropy:
        """The sum of the loss over target tokens, their number, and how many are predicted right."""

    def step(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        return self._mean(backbone, batch, self.label_smoothing)

    def evaluate(self, backbone: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """The step without smoothing."""
        return self._mean(backbone, batch, 0.0)

    def _mean(self, backbone: nn.Module, batch: Mapping[str, Any], label_smoothing: float) -> StepOutput:
        out = self.token_loss(backbone, batch, label_smoothing)
        counted = {"token_accuracy": (out.correct, out.count)}
        return StepOutput(loss=out.loss / max(out.count, 1), weight=out.count, updates=counted if out.count else {})


class CausalLM(TokenTask):
    """Cross-entropy of each token given those before it; perplexity and the share of tokens predicted right.

    Perplexity is `exp(sum of -log p / number of trained tokens)`, over all tokens of a stage and of all processes.

    Args:
        label_smoothing: share of the target spread over the vocabulary, in training alone.
    """

    peft_task_type = "CAUSAL_LM"
    not_inputs = ("labels", "document")

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing, {"perplexity": Perplexity()})
        if label_smoothing:  # the exp of a smoothed loss is no perplexity
            del self.metrics["train_"]["perplexity"]  # type: ignore[operator]

    def inputs(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The backbone's arguments; a packed batch is unpacked into rows of one document."""
        inputs = super().inputs(backbone, batch)
        return unpack(inputs) if is_packed(inputs) else inputs

    def token_loss(self, backbone: nn.Module, batch: Mapping[str, Any], label_smoothing: float) -> LinearCrossEntropy:
        """`batch` has the backbone's keyword arguments and `labels` (b, t), -100 where nothing is trained on.

        With `position_ids` and no `attention_mask` its rows are packed: documents that restart at position 0. A
        backbone that mixes them is refused.
        """
        labels = labels_of(batch)
        return shifted_loss(backbone, self._packed_or_not(backbone, batch), labels, label_smoothing=label_smoothing)

    def _mean(self, backbone: nn.Module, batch: Mapping[str, Any], label_smoothing: float) -> StepOutput:
        out = super()._mean(backbone, batch, label_smoothing)
        if out.weight and not label_smoothing:
            out.updates["perplexity"] = (out.loss.detach(), out.weight)
        return out

    @torch.no_grad()
    def predict(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """For each row the mean loss over its tokens but the first, their number, and the perplexity.

        A row without such tokens has NaN for both. `document` is included where the batch has it.
        """
        labels = labels_of(batch)
        parts = shifted_losses(backbone, self._packed_or_not(backbone, batch), labels)
        tokens = torch.tensor([part.count for part in parts], device=labels.device)
        loss = torch.stack([part.loss for part in parts]).to(labels.device) / tokens
        document = {"document": batch["document"]} if "document" in batch else {}
        return {**document, "loss": loss, "tokens": tokens, "perplexity": loss.exp()}

    def _packed_or_not(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The backbone's arguments for the batch's rows as they are."""
        inputs = inputs_of(batch, *self.not_inputs)
        return as_packed(backbone, inputs) if is_packed(inputs) else inputs
