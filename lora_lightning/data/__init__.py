"""Where examples come from: one DataModule per kind of input."""

from lora_lightning.data.sampler import EpochSampler
from lora_lightning.data.text_classification import TextClassificationData

__all__ = ["EpochSampler", "TextClassificationData"]
