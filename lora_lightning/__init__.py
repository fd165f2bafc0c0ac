"""LoRA fine-tuning on PyTorch Lightning.

Names load what they need on first use, so that the parts in plain torch come without Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lightning.lora.config import LoRAConfig as LoRAConfig
    from lora_lightning.lora.errors import LoRAError as LoRAError
    from lora_lightning.lora.formats import load_adapter as load_adapter
    from lora_lightning.lora.formats import save_adapter as save_adapter
    from lora_lightning.lora.inject import disabled as disabled
    from lora_lightning.lora.inject import inject as inject
    from lora_lightning.lora.inject import remove as remove
    from lora_lightning.lora.merge import merge as merge

_WHERE = {
    "LoRAConfig": "lora_lightning.lora.config",
    "LoRAError": "lora_lightning.lora.errors",
    "inject": "lora_lightning.lora.inject",
    "remove": "lora_lightning.lora.inject",
    "disabled": "lora_lightning.lora.inject",
    "merge": "lora_lightning.lora.merge",
    "save_adapter": "lora_lightning.lora.formats",
    "load_adapter": "lora_lightning.lora.formats",
}

__all__ = sorted(_WHERE)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lora_lightning' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
