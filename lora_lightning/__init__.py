"""LoRA fine-tuning on PyTorch Lightning.

The public names and their modules are in `__init__.pyi`, for type checkers and for this file. Each is imported on first
use, so that the parts in plain torch do not import Lightning.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_WHERE = {
    alias.name: str(node.module) for node in _STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names
}
"""The module of each public name."""

GONE = {
    "FSDP1Strategy": "it is gone, since torch no longer develops FSDP1: take FSDP2Strategy",
    "ZeRO2Strategy": "it is gone, since an adapter's optimizer is a few megabytes: take DDP, or FSDP2Strategy",
    "ZeRO3Strategy": "it is gone, since it saved nothing over FSDP2: take FSDP2Strategy",
    "Baselines": "it is in the repository's folder demos: run from a clone and take demos.baselines.Baselines",
    "read_animals": "it is in the repository's folder demos: run from a clone and take demos.animals.read_animals",
    "dinov2_small": "it is in the repository's folder demos: run from a clone and take demos.dinov2.dinov2_small",
    "efficientnet_lite0": "it is in the repository's folder demos: take demos.efficientnet.efficientnet_lite0",
}
"""Public names of earlier versions, and their replacements; `lora.errors.REMOVED` has those of `lora`."""

__all__ = sorted(_WHERE)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in GONE:  # an AttributeError's words would be lost in `from lora_lightning import name`
        raise ImportError(f"lora_lightning.{name}: {GONE[name]}")
    if name not in _WHERE:
        from lora_lightning.lora.errors import REMOVED

        if name in REMOVED:
            raise ImportError(f"lora_lightning.{name} is gone: {REMOVED[name]}")
        raise AttributeError(f"module 'lora_lightning' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
