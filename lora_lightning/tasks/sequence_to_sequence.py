"""A text from a text with an encoder and a decoder: translation, summaries, questions to answers (T5, BART, Marian)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import inputs_and_labels, inputs_of
from lora_lightning.tasks.generating import GeneratingTask
from lora_lightning.tasks.losses.lm_head import aligned_loss
from lora_lightning.tasks.losses.token_loss import LinearCrossEntropy

NOT_INPUTS = ("labels", "references")
"""Entries of a batch that are not the backbone's."""
DECODER = ("decoder_input_ids", "decoder_attention_mask")


class SequenceToSequence(GeneratingTask):
    """Cross-entropy of each target token given the source and the target before it; BLEU, ROUGE and exact match.

    Args:
        tokenizer: which the texts are read with. The data's own by default.
        generation: options of transformers' `generate` by name, such as num_beams, max_new_tokens, length_penalty and
            no_repeat_ngram_size. By default the model's own, of at most 64 tokens.
        metrics: of bleu, chrf, ter, rouge1, rouge2, rougeL, rougeLsum and exact_match. The first says which checkpoint
            is best.
        label_smoothing: share of the target spread over the vocabulary, in training alone.
        generate_in_validation: whether validation writes texts; without, the best checkpoint has the least loss, and
            only test and predict write.
    """

    peft_task_type = "SEQ_2_SEQ_LM"

    def inputs(self, backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The encoder's inputs, and what the decoder is given: the labels shifted by the model, unless it is there.

        Raises:
            LoRAError: the model does not shift labels.
        """
        inputs = inputs_of(batch, *NOT_INPUTS)
        if "decoder_input_ids" not in inputs:
            shift = getattr(backbone, "prepare_decoder_input_ids_from_labels", None)
            if shift is None:
                raise LoRAError(
                    f"{type(backbone).__name__} does not say what its decoder starts from"
                    " (prepare_decoder_input_ids_from_labels): take a transformers model for sequence to sequence"
                    " (auto_class: AutoModelForSeq2SeqLM), or put decoder_input_ids into the batch"
                )
            inputs["decoder_input_ids"] = shift(labels=batch["labels"])
        return inputs

    def token_loss(self, backbone: nn.Module, batch: Mapping[str, Any], label_smoothing: float) -> LinearCrossEntropy:
        """`batch` holds the encoder's inputs and `labels` (b, t), -100 where nothing is trained on.

        Raises:
            LoRAError: there are no labels; the model does not shift them; or nothing is trained on.
        """
        _, labels = inputs_and_labels(batch)
        return aligned_loss(backbone, self.inputs(backbone, batch), labels, label_smoothing=label_smoothing)

    def sources(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return inputs_of(batch, *NOT_INPUTS, *DECODER)
