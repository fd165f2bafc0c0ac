"""A completion of a prompt by a decoder-only model: tables to texts (E2E, WebNLG, DART), answers, summaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import inputs_and_labels, inputs_of
from lora_lightning.tasks.generating import GeneratingTask
from lora_lightning.tasks.losses.lm_head import shifted_loss
from lora_lightning.tasks.losses.token_loss import LinearCrossEntropy

PROMPT = "prompt_"
"""What stands before the name of an input that holds prompts alone."""


class TextGeneration(GeneratingTask):
    """Cross-entropy of each token of the completion given the prompt and what comes before; BLEU, ROUGE, exact match.

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

    peft_task_type = "CAUSAL_LM"

    def inputs(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        return inputs_of(batch, "labels", "references", *(key for key in batch if key.startswith(PROMPT)))

    def token_loss(self, backbone: nn.Module, batch: Mapping[str, Any], label_smoothing: float) -> LinearCrossEntropy:
        """`batch` holds the backbone's keyword arguments and `labels` (b, t), -100 on the prompt and on padding.

        Raises:
            LoRAError: there are no labels, or nothing is trained on.
        """
        _, labels = inputs_and_labels(batch)
        return shifted_loss(backbone, self.inputs(backbone, batch), labels, label_smoothing=label_smoothing)

    def sources(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The prompts, `prompt_input_ids` and `prompt_attention_mask`, padded on the left.

        Raises:
            LoRAError: the batch has none.
        """
        prompts = {key.removeprefix(PROMPT): value for key, value in batch.items() if key.startswith(PROMPT)}
        if "input_ids" not in prompts:
            raise LoRAError(
                "to write texts, the batch needs prompt_input_ids and prompt_attention_mask, padded on the left; it has"
                f" {', '.join(batch)}"
            )
        return prompts
