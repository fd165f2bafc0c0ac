"""Texts that a transformers model writes, for validation and prediction: greedy or by beams, always the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerBase,
)

from lora_lightning.lora.errors import LoRAError, did_you_mean

MAX_NEW_TOKENS = 64
"""Where neither the task nor the model's own generation config says how long a text may be."""
OURS = frozenset({"num_return_sequences", "return_dict_in_generate", "transformers_version"})
"""Settings of a generation config that would change what comes back."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "top_h")
"""Settings that mean nothing without sampling; the configs of chat models bring them."""


def check_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of `generate` by their names in transformers' `GenerationConfig`.

    Raises:
        LoRAError: one that is unknown, or that would change what comes back.
    """
    plain = vars(GenerationConfig())  # type: ignore[no-untyped-call]
    known = sorted(name for name in plain if not name.startswith("_") and name not in OURS)
    for name in options or {}:
        if name not in known:
            raise LoRAError(f"generation has no option '{name}'{did_you_mean(name, known)} (see GenerationConfig)")
    return dict(options or {})


@torch.no_grad()
def generate_texts(
    backbone: nn.Module,
    inputs: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any],
) -> list[str]:
    """What the model writes for each row, without special tokens and without blanks at both ends.

    Args:
        backbone: encoder-decoder or decoder-only, with transformers' `generate`.
        inputs: `input_ids` (b, t) and `attention_mask`. Of a decoder-only model prompts, padded on the left: so the
            last position of each row is what comes before the text.
        options: settings of `GenerationConfig`, which win over the model's own. Without `do_sample: true` the text is
            the most probable one found, whatever the model's own config says. `no_repeat_ngram_size` is about the text
            alone: it may say what the prompt says, which transformers' own would forbid to a decoder-only model.

    Raises:
        LoRAError: the backbone cannot generate.
    """
    if not callable(getattr(backbone, "generate", None)) or not hasattr(backbone, "generation_config"):
        raise LoRAError(
            f"{type(backbone).__name__} has no `generate`: to write texts the backbone must be a transformers model"
            " with a language-model head, such as lora_lightning.huggingface with auto_class: AutoModelForCausalLM or"
            " AutoModelForSeq2SeqLM"
        )
    config = generation_config(backbone.generation_config, tokenizer, options)
    after = 0 if backbone.config.is_encoder_decoder else inputs["input_ids"].shape[1]  # type: ignore[union-attr]
    processors = LogitsProcessorList()
    if after and config.no_repeat_ngram_size:
        processors.append(NoRepeatInText(config.no_repeat_ngram_size, after))
        config.no_repeat_ngram_size = None
    written = backbone.generate(**inputs, generation_config=config, logits_processor=processors)  # type: ignore[operator]
    written = written[:, after:]
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


class NoRepeatInText(NoRepeatNGramLogitsProcessor):
    """No n tokens in a row twice in what is written, as fairseq and the LoRA paper's GPT-2 runs have it.

    Args:
        size: n.
        after: how many tokens of prompt there are, which do not count.
    """

    def __init__(self, size: int, after: int) -> None:
        super().__init__(size)
        self.after = after

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return super().__call__(input_ids[:, self.after :], scores)


def generation_config(own: Any, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> GenerationConfig:
    """The model's own config with the options put in, ended and padded by the tokenizer's tokens as well."""
    config: GenerationConfig = copy.deepcopy(own)
    config.update(**{"do_sample": False, **options})  # type: ignore[no-untyped-call]
    if not config.do_sample:
        for name in SAMPLING:
            if name not in options:
                setattr(config, name, None)
    if "max_length" not in options:
        config.max_length = None
        config.max_new_tokens = config.max_new_tokens or MAX_NEW_TOKENS
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if "eos_token_id" not in options:
        config.eos_token_id = list(dict.fromkeys(i for i in (*ends, tokenizer.eos_token_id) if i is not None)) or None
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return config
