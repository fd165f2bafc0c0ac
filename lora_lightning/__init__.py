"""LoRA fine-tuning on PyTorch Lightning.

Names load what they need on first use, so that the parts in plain torch come without Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lightning.backbones.huggingface import huggingface as huggingface
    from lora_lightning.backbones.vision import timm_model as timm_model
    from lora_lightning.backbones.vision import torchvision_model as torchvision_model
    from lora_lightning.cli.main import LoRACLI as LoRACLI
    from lora_lightning.data.chat.data import ChatData as ChatData
    from lora_lightning.data.chat.prompt_completion import PromptCompletionData as PromptCompletionData
    from lora_lightning.data.dataset import DatasetData as DatasetData
    from lora_lightning.data.dataset import hub_dataset as hub_dataset
    from lora_lightning.data.images.data import ImageData as ImageData
    from lora_lightning.data.images.segmentation import SegmentationData as SegmentationData
    from lora_lightning.data.images.texts import ImageTextData as ImageTextData
    from lora_lightning.data.language_modelling import LanguageModellingData as LanguageModellingData
    from lora_lightning.data.loading.loader import ResumableLoader as ResumableLoader
    from lora_lightning.data.pairs import PairData as PairData
    from lora_lightning.data.preference import PreferenceData as PreferenceData
    from lora_lightning.data.seq2seq import SequenceToSequenceData as SequenceToSequenceData
    from lora_lightning.data.text.classification import TextClassificationData as TextClassificationData
    from lora_lightning.data.text.multi_label import MultiLabelTextData as MultiLabelTextData
    from lora_lightning.data.text.regression import TextRegressionData as TextRegressionData
    from lora_lightning.data.text.token_classification import TokenClassificationData as TokenClassificationData
    from lora_lightning.export.merge_on_disk import merge_on_disk as merge_on_disk
    from lora_lightning.lora.bank.bank import AdapterBank as AdapterBank
    from lora_lightning.lora.config import LoRAConfig as LoRAConfig
    from lora_lightning.lora.errors import AdapterWarning as AdapterWarning
    from lora_lightning.lora.errors import LoRAError as LoRAError
    from lora_lightning.lora.formats.loralib import load_loralib as load_loralib
    from lora_lightning.lora.formats.peft.load import load_adapter as load_adapter
    from lora_lightning.lora.formats.peft.save import save_adapter as save_adapter
    from lora_lightning.lora.inject import disabled as disabled
    from lora_lightning.lora.inject import inject as inject
    from lora_lightning.lora.inject import remove as remove
    from lora_lightning.lora.merge import merge as merge
    from lora_lightning.lora.meta.build import on_meta as on_meta
    from lora_lightning.lora.meta.fill import fill_from_files as fill_from_files
    from lora_lightning.tasks.causal_lm import CausalLM as CausalLM
    from lora_lightning.tasks.contrastive import ContrastiveEmbedding as ContrastiveEmbedding
    from lora_lightning.tasks.image_classification import ImageClassification as ImageClassification
    from lora_lightning.tasks.image_segmentation import ImageSegmentation as ImageSegmentation
    from lora_lightning.tasks.multi_label import MultiLabelClassification as MultiLabelClassification
    from lora_lightning.tasks.preference import PreferenceTuning as PreferenceTuning
    from lora_lightning.tasks.sequence_classification import SequenceClassification as SequenceClassification
    from lora_lightning.tasks.sequence_regression import SequenceRegression as SequenceRegression
    from lora_lightning.tasks.sequence_to_sequence import SequenceToSequence as SequenceToSequence
    from lora_lightning.tasks.supervised import Supervised as Supervised
    from lora_lightning.tasks.text_generation import TextGeneration as TextGeneration
    from lora_lightning.tasks.token_classification import TokenClassification as TokenClassification
    from lora_lightning.training.callbacks.baselines import Baselines as Baselines
    from lora_lightning.training.callbacks.export_on_fit_end import ExportAtEnd as ExportAtEnd
    from lora_lightning.training.callbacks.freeze_base import FreezeBase as FreezeBase
    from lora_lightning.training.callbacks.generation_samples import Samples as Samples
    from lora_lightning.training.callbacks.gradient_norms import StepFigures as StepFigures
    from lora_lightning.training.callbacks.initial_validation import MeasureBefore as MeasureBefore
    from lora_lightning.training.callbacks.nan_guard import StopOnNonFinite as StopOnNonFinite
    from lora_lightning.training.callbacks.progress_bar import Progress as Progress
    from lora_lightning.training.callbacks.rank_telemetry import RankTelemetry as RankTelemetry
    from lora_lightning.training.callbacks.run_report import RunReport as RunReport
    from lora_lightning.training.callbacks.throughput import Throughput as Throughput
    from lora_lightning.training.checkpoints.model_checkpoint import Checkpoints as Checkpoints
    from lora_lightning.training.checkpoints.resume import Resume as Resume
    from lora_lightning.training.module import LoRAModule as LoRAModule
    from lora_lightning.training.optim import WarmupDecay as WarmupDecay
    from lora_lightning.training.precision import HalfBase as HalfBase
    from lora_lightning.training.strategies.fsdp2.strategy import FSDP2Strategy as FSDP2Strategy
    from lora_lightning.training.tracking.wandb_callback import Tracking as Tracking
    from lora_lightning.training.tracking.wandb_logger import WandbLogger as WandbLogger
    from lora_lightning.training.trainer import LoRATrainer as LoRATrainer

_WHERE = {
    "AdapterBank": "lora_lightning.lora.bank.bank",
    "LoRAConfig": "lora_lightning.lora.config",
    "AdapterWarning": "lora_lightning.lora.errors",
    "LoRAError": "lora_lightning.lora.errors",
    "inject": "lora_lightning.lora.inject",
    "remove": "lora_lightning.lora.inject",
    "disabled": "lora_lightning.lora.inject",
    "merge": "lora_lightning.lora.merge",
    "save_adapter": "lora_lightning.lora.formats.peft.save",
    "load_adapter": "lora_lightning.lora.formats.peft.load",
    "load_loralib": "lora_lightning.lora.formats.loralib",
    "merge_on_disk": "lora_lightning.export.merge_on_disk",
    "huggingface": "lora_lightning.backbones.huggingface",
    "SequenceClassification": "lora_lightning.tasks.sequence_classification",
    "TextClassificationData": "lora_lightning.data.text.classification",
    "LoRAModule": "lora_lightning.training.module",
    "LoRATrainer": "lora_lightning.training.trainer",
    "WarmupDecay": "lora_lightning.training.optim",
    "WandbLogger": "lora_lightning.training.tracking.wandb_logger",
    "FreezeBase": "lora_lightning.training.callbacks.freeze_base",
    "ExportAtEnd": "lora_lightning.training.callbacks.export_on_fit_end",
    "RunReport": "lora_lightning.training.callbacks.run_report",
    "Baselines": "lora_lightning.training.callbacks.baselines",
    "LoRACLI": "lora_lightning.cli.main",
    "SequenceRegression": "lora_lightning.tasks.sequence_regression",
    "MultiLabelClassification": "lora_lightning.tasks.multi_label",
    "CausalLM": "lora_lightning.tasks.causal_lm",
    "ImageClassification": "lora_lightning.tasks.image_classification",
    "ImageSegmentation": "lora_lightning.tasks.image_segmentation",
    "TextRegressionData": "lora_lightning.data.text.regression",
    "MultiLabelTextData": "lora_lightning.data.text.multi_label",
    "LanguageModellingData": "lora_lightning.data.language_modelling",
    "ChatData": "lora_lightning.data.chat.data",
    "ImageData": "lora_lightning.data.images.data",
    "timm_model": "lora_lightning.backbones.vision",
    "torchvision_model": "lora_lightning.backbones.vision",
    "MeasureBefore": "lora_lightning.training.callbacks.initial_validation",
    "Samples": "lora_lightning.training.callbacks.generation_samples",
    "TokenClassification": "lora_lightning.tasks.token_classification",
    "SequenceToSequence": "lora_lightning.tasks.sequence_to_sequence",
    "TextGeneration": "lora_lightning.tasks.text_generation",
    "PreferenceTuning": "lora_lightning.tasks.preference",
    "ContrastiveEmbedding": "lora_lightning.tasks.contrastive",
    "Supervised": "lora_lightning.tasks.supervised",
    "TokenClassificationData": "lora_lightning.data.text.token_classification",
    "SequenceToSequenceData": "lora_lightning.data.seq2seq",
    "PromptCompletionData": "lora_lightning.data.chat.prompt_completion",
    "PreferenceData": "lora_lightning.data.preference",
    "PairData": "lora_lightning.data.pairs",
    "DatasetData": "lora_lightning.data.dataset",
    "hub_dataset": "lora_lightning.data.dataset",
    "SegmentationData": "lora_lightning.data.images.segmentation",
    "ImageTextData": "lora_lightning.data.images.texts",
    "Checkpoints": "lora_lightning.training.checkpoints.model_checkpoint",
    "Resume": "lora_lightning.training.checkpoints.resume",
    "StopOnNonFinite": "lora_lightning.training.callbacks.nan_guard",
    "ResumableLoader": "lora_lightning.data.loading.loader",
    "FSDP2Strategy": "lora_lightning.training.strategies.fsdp2.strategy",
    "HalfBase": "lora_lightning.training.precision",
    "RankTelemetry": "lora_lightning.training.callbacks.rank_telemetry",
    "Throughput": "lora_lightning.training.callbacks.throughput",
    "StepFigures": "lora_lightning.training.callbacks.gradient_norms",
    "Tracking": "lora_lightning.training.tracking.wandb_callback",
    "Progress": "lora_lightning.training.callbacks.progress_bar",
    "on_meta": "lora_lightning.lora.meta.build",
    "fill_from_files": "lora_lightning.lora.meta.fill",
}

GONE = {
    "FSDP1Strategy": "it is gone, since torch no longer develops FSDP1: take FSDP2Strategy",
    "ZeRO2Strategy": "it is gone, since an adapter's optimizer is a few megabytes: take DDP, or FSDP2Strategy",
    "ZeRO3Strategy": "it is gone, since it saved nothing over FSDP2: take FSDP2Strategy",
}
"""Public names of earlier versions, and what to take in their place."""

__all__ = sorted(_WHERE)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in GONE:
        raise ImportError(f"lora_lightning.{name}: {GONE[name]}")
    if name not in _WHERE:
        from lora_lightning.lora.errors import REMOVED

        if name in REMOVED:  # an AttributeError's words would be lost in `from lora_lightning import name`
            raise ImportError(f"lora_lightning.{name} is gone: {REMOVED[name]}")
        raise AttributeError(f"module 'lora_lightning' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
