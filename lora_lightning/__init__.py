"""LoRA fine-tuning on PyTorch Lightning.

Names load what they need on first use, so that the parts in plain torch come without Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lightning.backbones import huggingface as huggingface
    from lora_lightning.cli import LoRACLI as LoRACLI
    from lora_lightning.data.text_classification import TextClassificationData as TextClassificationData
    from lora_lightning.disk_merge import merge_on_disk as merge_on_disk
    from lora_lightning.lora.bank import AdapterBank as AdapterBank
    from lora_lightning.lora.config import LoRAConfig as LoRAConfig
    from lora_lightning.lora.errors import AdapterWarning as AdapterWarning
    from lora_lightning.lora.errors import LoRAError as LoRAError
    from lora_lightning.lora.formats import load_adapter as load_adapter
    from lora_lightning.lora.formats import save_adapter as save_adapter
    from lora_lightning.lora.inject import disabled as disabled
    from lora_lightning.lora.inject import inject as inject
    from lora_lightning.lora.inject import remove as remove
    from lora_lightning.lora.loralib import load_loralib as load_loralib
    from lora_lightning.lora.merge import merge as merge
    from lora_lightning.tasks.sequence_classification import SequenceClassification as SequenceClassification
    from lora_lightning.training.callbacks.baselines import Baselines as Baselines
    from lora_lightning.training.callbacks.export import ExportAtEnd as ExportAtEnd
    from lora_lightning.training.callbacks.freeze import FreezeBase as FreezeBase
    from lora_lightning.training.callbacks.run_report import RunReport as RunReport
    from lora_lightning.training.loggers import WandbLogger as WandbLogger
    from lora_lightning.training.module import LoRAModule as LoRAModule
    from lora_lightning.training.optim import WarmupDecay as WarmupDecay
    from lora_lightning.training.trainer import LoRATrainer as LoRATrainer

_WHERE = {
    "AdapterBank": "lora_lightning.lora.bank",
    "LoRAConfig": "lora_lightning.lora.config",
    "AdapterWarning": "lora_lightning.lora.errors",
    "LoRAError": "lora_lightning.lora.errors",
    "inject": "lora_lightning.lora.inject",
    "remove": "lora_lightning.lora.inject",
    "disabled": "lora_lightning.lora.inject",
    "merge": "lora_lightning.lora.merge",
    "save_adapter": "lora_lightning.lora.formats",
    "load_adapter": "lora_lightning.lora.formats",
    "load_loralib": "lora_lightning.lora.loralib",
    "merge_on_disk": "lora_lightning.disk_merge",
    "huggingface": "lora_lightning.backbones",
    "SequenceClassification": "lora_lightning.tasks.sequence_classification",
    "TextClassificationData": "lora_lightning.data.text_classification",
    "LoRAModule": "lora_lightning.training.module",
    "LoRATrainer": "lora_lightning.training.trainer",
    "WarmupDecay": "lora_lightning.training.optim",
    "WandbLogger": "lora_lightning.training.loggers",
    "FreezeBase": "lora_lightning.training.callbacks.freeze",
    "ExportAtEnd": "lora_lightning.training.callbacks.export",
    "RunReport": "lora_lightning.training.callbacks.run_report",
    "Baselines": "lora_lightning.training.callbacks.baselines",
    "LoRACLI": "lora_lightning.cli",
}

__all__ = sorted(_WHERE)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lora_lightning' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
