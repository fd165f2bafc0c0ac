"""Where examples come from: one DataModule per kind of input."""

from lora_lightning.data.base import TableData
from lora_lightning.data.loading.sampler import EpochSampler
from lora_lightning.data.text import TextData

__all__ = ["EpochSampler", "TableData", "TextData"]
