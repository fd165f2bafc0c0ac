"""A tokenizer by one line of YAML."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_lightning.lora.errors import LoRAError
from lora_lightning.paths import resolve


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """By a hub name, a directory or `package:NAME/path`; one without a padding token pads with its end of text.

    Args:
        options: more arguments for `from_pretrained`.

    Raises:
        LoRAError: there is none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve(name), **options)
    except (OSError, ValueError) as error:
        raise LoRAError(f"no tokenizer '{name}': {str(error).strip().splitlines()[0]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
