"""A tokenizer, or a processor, by one line of YAML."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lora_lightning.backbones.locate import directory_and_file, refuse_not_there, resolve
from lora_lightning.lora.errors import LoRAError, first_line

FILES = r"tokenizer|vocab|\.model$|tekken"
"""Matches the names of files that hold a tokenizer."""

TRUSTED: set[str] = set()
"""Names of models whose code may run, since the config gives their backbone `trust_remote_code`."""


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer by a hub name, a directory, a GGUF file or `package:NAME/path`.

    A tokenizer without a padding token pads with its end-of-text token.

    Args:
        options: more arguments for `from_pretrained`.

    Raises:
        LoRAError: there is none.
    """
    location, gguf = directory_and_file(resolve(name))
    refuse_not_there("tokenizer", location)
    options = {"trust_remote_code": name in TRUSTED, **gguf, **options}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location, **options)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise LoRAError(
                f"the tokenizer of '{name}' brings code of its own, which is not run unasked: read it, and then give"
                " the backbone of that name model_kwargs: {trust_remote_code: true}"
            ) from error
        if Path(location).is_dir() and not any(re.search(FILES, file.name) for file in Path(location).iterdir()):
            raise LoRAError(f"no tokenizer in '{name}', such as tokenizer.json: name the folder that has it") from error
        raise LoRAError(f"no tokenizer '{name}': {' '.join(str(error).split())}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_processor(auto_class: Any, name: str, kind: str = "processor") -> Any:
    """`auto_class.from_pretrained` of a hub name, a directory or `package:NAME/path`; `kind` names it in errors."""
    location = resolve(name)
    refuse_not_there(kind, location)
    try:
        with quiet():
            return auto_class.from_pretrained(location)
    except (OSError, ValueError, ImportError) as error:
        raise LoRAError(f"no {kind} '{name}': {first_line(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block transformers reports nothing: a new head is expected, and other missing tensors are refused."""
    log: Any = transformers_logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
