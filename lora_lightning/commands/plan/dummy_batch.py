"""A made-up batch like a fit's, from a config: the number of rows, their length, the size of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import PIXELS, Task
from lora_lightning.tasks.classification import (
    ImageClassification,
    MultiLabelClassification,
    SequenceClassification,
    SequenceRegression,
)
from lora_lightning.tasks.contrastive import ContrastiveEmbedding
from lora_lightning.tasks.generation import SequenceToSequence, TextGeneration
from lora_lightning.tasks.language_model import CausalLM
from lora_lightning.tasks.losses.linear_cross_entropy import IGNORED
from lora_lightning.tasks.preference import PreferenceTuning
from lora_lightning.tasks.segmentation import ImageSegmentation
from lora_lightning.tasks.token_classification import TokenClassification

IMAGE_TASKS = (ImageClassification, ImageSegmentation)


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """The size of a training batch."""

    rows: int
    """Examples per process and step."""
    length: int | None = None
    """Tokens of a text."""
    target_length: int | None = None
    """Tokens of the target text, in sequence to sequence."""
    image: tuple[int, int, int] | None = None
    """Channels, height and width."""
    packed: bool = False
    """Whether rows hold several documents."""

    def __str__(self) -> str:
        parts = [f"{self.length} tokens"] if self.length else []
        parts += [f"{self.target_length} of the target"] if self.target_length else []
        parts += ["x".join(map(str, self.image))] if self.image else []
        return f"{self.rows} x {', '.join(parts)}"


def batch_for(task: Task, backbone: nn.Module, size: BatchSize) -> dict[str, Any]:
    """A batch for `task.step` with rows of the greatest length.

    All rows but the first are one token shorter, so that they are padded and need a mask, as in most batches.

    Raises:
        LoRAError: the batches of this task are unknown.
    """
    for kind, make in MAKERS.items():
        if isinstance(task, kind):
            with torch.device("cpu"):
                return make(task, _Maker(size, backbone))
    known = ", ".join(kind.__name__ for kind in MAKERS)
    raise LoRAError(f"the batches of {type(task).__name__} are not known without its data (known: {known})")


class _Maker:
    """Makes the parts of batches."""

    def __init__(self, size: BatchSize, backbone: Any) -> None:
        self.size = size
        config = getattr(backbone, "config", None)
        text = config.get_text_config() if config is not None else None
        self.vocabulary = int(getattr(text, "vocab_size", None) or 8)  # a few where the backbone does not say

    def texts(self, rows: int = 0, length: int | None = None) -> dict[str, Tensor]:
        """Token ids and their mask."""
        rows, length = rows or self.size.rows, length or self.size.length
        if length is None:
            raise LoRAError("the length of the texts is not in the config: give --length")
        ids = 1 + torch.arange(rows * length).view(rows, length) % max(1, self.vocabulary - 1)
        mask = torch.ones_like(ids)
        mask[1:, -1] = 0
        return {"input_ids": ids, "attention_mask": mask}

    def language(self, rows: int = 0, length: int | None = None) -> dict[str, Tensor]:
        """Texts in which every token but padding is its own label."""
        texts = self.texts(rows, length)
        return {**texts, "labels": texts["input_ids"].masked_fill(texts["attention_mask"] == 0, IGNORED)}

    def packed_texts(self) -> dict[str, Tensor]:
        """Texts of two documents each."""
        ids = self.texts()["input_ids"]
        positions = torch.arange(ids.shape[1]).expand_as(ids) % (ids.shape[1] // 2 or 1)
        return {"input_ids": ids, "labels": ids.clone(), "position_ids": positions}

    def images(self) -> dict[str, Tensor]:
        """Black images."""
        assert self.size.image is not None
        return {PIXELS: torch.zeros(self.size.rows, *self.size.image)}

    def labels(self, *shape: int, dtype: torch.dtype = torch.long) -> dict[str, Tensor]:
        """Labels of class 0, of `shape` for each row."""
        return {"labels": torch.zeros(self.size.rows, *shape, dtype=dtype)}


def _tags(task: Any, make: _Maker) -> dict[str, Any]:
    texts = make.texts()
    return {**texts, "labels": (texts["attention_mask"] - 1) * -IGNORED}


def _language(task: Any, make: _Maker) -> dict[str, Any]:
    return make.packed_texts() if make.size.packed else make.language()


def _source_and_target(task: Any, make: _Maker) -> dict[str, Any]:
    return {**make.texts(), "labels": make.language(length=make.size.target_length)["labels"]}


def _pairs(task: Any, make: _Maker) -> dict[str, Any]:
    groups = {"labels": torch.full((make.size.rows, 1), -1)}
    if make.size.image is not None:
        return {**make.texts(), **make.images(), **groups}
    return {"anchor": make.texts(), "positive": make.texts(), **groups}


def _masks(task: Any, make: _Maker) -> dict[str, Any]:
    pixels = make.images()
    return {**pixels, **make.labels(*pixels[PIXELS].shape[2:], dtype=torch.uint8)}


MAKERS: dict[type[Task], Callable[[Any, _Maker], dict[str, Any]]] = {
    SequenceClassification: lambda _, make: {**make.texts(), **make.labels()},
    SequenceRegression: lambda _, make: {**make.texts(), **make.labels(dtype=torch.float32)},
    MultiLabelClassification: lambda task, make: {
        **make.texts(),
        **make.labels(task.num_classes, dtype=torch.float32),
    },
    TokenClassification: _tags,
    CausalLM: _language,
    TextGeneration: _language,
    SequenceToSequence: _source_and_target,
    PreferenceTuning: lambda _, make: make.language(rows=2 * make.size.rows),
    ContrastiveEmbedding: _pairs,
    ImageClassification: lambda _, make: {**make.images(), **make.labels()},
    ImageSegmentation: _masks,
}
