"""Models and tokenizers from llama.cpp's GGUF files, which transformers reads into plain, unquantized tensors."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_lightning.lora.errors import LoRAError

SUFFIX = ".gguf"


def directory_and_file(name: str) -> tuple[str, dict[str, str]]:
    """The file's directory and the `gguf_file` argument with which transformers opens it; other names unchanged.

    Args:
        name: a hub name, a directory, or a GGUF file.

    Raises:
        LoRAError: it is a GGUF file and the package that reads them is missing.
    """
    file = Path(name)
    if file.suffix != SUFFIX:
        return name, {}
    if not file.is_file():
        raise LoRAError(f"no file {name}")
    if find_spec("gguf") is None:
        raise LoRAError(f"{file.name} needs the package that reads GGUF files: pip install 'lora_lightning[lm]'")
    return str(file.parent), {"gguf_file": file.name}


def forget_gguf(model: Any) -> None:
    """Let transformers save a model that it read from GGUF, which it still marks as quantized."""
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized = False
