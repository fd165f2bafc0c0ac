"""A tokenizer by one line of YAML."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_lightning.gguf import directory_and_file
from lora_lightning.hub import refuse_not_there
from lora_lightning.lora.errors import LoRAError
from lora_lightning.paths import resolve


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """By a hub name, a directory, a GGUF file or `package:NAME/path`; one without a padding token pads with its end.

    Args:
        options: more arguments for `from_pretrained`.

    Raises:
        LoRAError: there is none.
    """
    found, gguf = directory_and_file(resolve(name))
    refuse_not_there("tokenizer", found)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(found, **gguf, **options)
    except (OSError, ValueError) as error:
        raise LoRAError(f"no tokenizer '{name}': {str(error).strip().splitlines()[0]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
