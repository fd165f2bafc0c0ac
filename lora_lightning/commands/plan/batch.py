"""A made-up batch like a fit's, without data: its size from flags, the config or the backbone, else assumed."""

from __future__ import annotations

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

ASSUMED_ROWS = 8
ASSUMED_LENGTH = 512
ASSUMED_SIDE = 224


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


def choose_size(
    args: dict[str, Any], task: Task, backbone: nn.Module, notes: list[str], *, rows: int | None, length: int | None
) -> BatchSize:
    """The size of a training batch; a note for whatever is assumed.

    Args:
        args: of the data's class, from the config.
        rows: from `--batch_size`.
        length: from `--length`.
    """
    rows = rows or args.get("batch_size")
    if rows is None:
        rows = ASSUMED_ROWS
        notes.append(f"{rows} rows in a batch are assumed, as the config names no batch_size: --batch_size")
    images_alone = isinstance(task, ImageClassification | ImageSegmentation)
    return BatchSize(
        rows=int(rows),
        length=_length(length, args, backbone, notes) if not images_alone else None,
        target_length=args.get("max_target_length"),
        image=_image_size(args, backbone, notes) if images_alone or "image_column" in args else None,
        packed=bool(args.get("packing")),
    )


def _length(length: int | None, args: dict[str, Any], backbone: nn.Module, notes: list[str]) -> int:
    length = length or args.get("max_length") or args.get("max_source_length")
    if length is None:
        positions = getattr(_text_config(backbone), "max_position_embeddings", None)
        length = min(positions or ASSUMED_LENGTH, ASSUMED_LENGTH)
        notes.append(f"texts of {length} tokens are assumed, as the config names no max_length: --length")
    return int(length)


def _text_config(backbone: Any) -> Any:
    config: Any = getattr(backbone, "config", None)  # of any class, where the model is one's own
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _image_size(args: dict[str, Any], backbone: Any, notes: list[str]) -> tuple[int, int, int]:
    config, of_timm = getattr(backbone, "config", None), getattr(backbone, "pretrained_cfg", None) or {}
    vision = getattr(config, "vision_config", None) or config
    channels, *sides = of_timm.get("input_size") or (3,)
    size: Any = args.get("image_size") or getattr(vision, "image_size", None) or sides
    if not size:
        size = ASSUMED_SIDE
        notes.append(f"images of {size} x {size} pixels are assumed, as neither config nor model name a size")
    height, width = (size, size) if isinstance(size, int) else size
    return int(getattr(vision, "num_channels", None) or channels), int(height), int(width)


def make_batch(task: Any, backbone: nn.Module, size: BatchSize) -> dict[str, Any]:
    """A batch for `task.step` with rows of the greatest length, of label 0 and black pixels.

    All rows but the first are one token shorter, so that they are padded and need a mask, as in most batches.

    Raises:
        LoRAError: the batches of this task are unknown.
    """
    vocabulary = int(getattr(_text_config(backbone), "vocab_size", None) or 8)  # a few where the backbone does not say
    rows = 2 * size.rows if isinstance(task, PreferenceTuning) else size.rows

    def texts(length: int | None = size.length) -> dict[str, Tensor]:
        assert length is not None
        ids = 1 + torch.arange(rows * length).view(rows, length) % max(1, vocabulary - 1)
        mask = torch.ones_like(ids)
        mask[1:, -1] = 0
        return {"input_ids": ids, "attention_mask": mask}

    def continued(length: int | None = size.length) -> dict[str, Tensor]:
        """Texts in which every token but padding is its own label."""
        batch = texts(length)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}

    def images() -> dict[str, Tensor]:
        assert size.image is not None
        return {PIXELS: torch.zeros(rows, *size.image)}

    def zeros(*shape: int, dtype: torch.dtype = torch.long) -> dict[str, Tensor]:
        return {"labels": torch.zeros(rows, *shape, dtype=dtype)}

    with torch.device("cpu"):
        match task:
            case SequenceClassification():
                return texts() | zeros()
            case SequenceRegression():
                return texts() | zeros(dtype=torch.float32)
            case MultiLabelClassification():
                return texts() | zeros(task.num_classes, dtype=torch.float32)
            case TokenClassification():
                batch = texts()
                return batch | {"labels": (batch["attention_mask"] - 1) * -IGNORED}
            case CausalLM() | TextGeneration() if size.packed:
                ids = texts()["input_ids"]  # of two documents each
                positions = torch.arange(ids.shape[1]).expand_as(ids) % (ids.shape[1] // 2 or 1)
                return {"input_ids": ids, "labels": ids.clone(), "position_ids": positions}
            case CausalLM() | TextGeneration() | PreferenceTuning():
                return continued()
            case SequenceToSequence():
                target = continued(size.target_length or size.length)
                return texts() | {"labels": target["labels"]}
            case ContrastiveEmbedding():
                groups = {"labels": torch.full((rows, 1), -1)}
                if size.image is not None:
                    return texts() | images() | groups
                return {"anchor": texts(), "positive": texts()} | groups
            case ImageClassification():
                return images() | zeros()
            case ImageSegmentation():
                assert size.image is not None
                return images() | zeros(*size.image[1:], dtype=torch.uint8)
    raise LoRAError(f"the batches of {type(task).__name__} are not known without its data")
