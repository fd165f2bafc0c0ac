"""A batch as a fit would see it, made up from what a config says: its rows, their length, the size of its images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import Task
from lora_lightning.tasks.causal_lm import CausalLM
from lora_lightning.tasks.contrastive import ContrastiveEmbedding
from lora_lightning.tasks.image_classification import ImageClassification
from lora_lightning.tasks.image_segmentation import ImageSegmentation
from lora_lightning.tasks.images import PIXELS
from lora_lightning.tasks.losses.token_loss import IGNORED
from lora_lightning.tasks.multi_label import MultiLabelClassification
from lora_lightning.tasks.preference import PreferenceTuning
from lora_lightning.tasks.sequence_classification import SequenceClassification
from lora_lightning.tasks.sequence_regression import SequenceRegression
from lora_lightning.tasks.sequence_to_sequence import SequenceToSequence
from lora_lightning.tasks.text_generation import TextGeneration
from lora_lightning.tasks.token_classification import TokenClassification

IMAGE_TASKS = (ImageClassification, ImageSegmentation)


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """How large a batch of training is."""

    rows: int
    """Examples per process and step."""
    length: int | None = None
    """Tokens of a text."""
    target_length: int | None = None
    """Tokens of the text that is made of it, in sequence to sequence."""
    image: tuple[int, int, int] | None = None
    """Channels, height and width."""
    packed: bool = False
    """Whether rows hold several documents."""

    def told(self) -> str:
        """In words."""
        parts = [
            f"{self.length} tokens" if self.length else "",
            f"{self.target_length} of the target" * bool(self.target_length),
        ]
        parts.append("x".join(map(str, self.image)) if self.image else "")
        return f"{self.rows} x {', '.join(filter(None, parts))}"


def batch_for(task: Task, backbone: nn.Module, size: BatchSize) -> dict[str, Any]:
    """The batch that `task.step` takes, of rows as long as they may be; all but the first are one token shorter.

    So they are padded, as those of most batches are, and a mask is needed.

    Raises:
        LoRAError: nothing is known of the batches of this task.
    """
    for kind, make in MAKERS.items():
        if isinstance(task, kind):
            return make(task, _Sizes(size, backbone))
    known = ", ".join(kind.__name__ for kind in MAKERS)
    raise LoRAError(f"the batches of {type(task).__name__} are not known without its data (known: {known})")


class _Sizes:
    """What all kinds of batches are made of."""

    def __init__(self, size: BatchSize, backbone: nn.Module) -> None:
        self.size, self.backbone = size, backbone

    def texts(self, rows: int | None = None, length: int | None = None) -> dict[str, Tensor]:
        rows, length = rows or self.size.rows, length or self.size.length
        if length is None:
            raise LoRAError("the length of the texts is not in the config: give --length")
        ids = 1 + torch.arange(rows * length, device="cpu").view(rows, length) % max(1, _vocabulary(self.backbone) - 1)
        mask = torch.ones_like(ids)
        mask[1:, -1] = 0
        return {"input_ids": ids, "attention_mask": mask}

    def images(self) -> Tensor:
        assert self.size.image is not None
        return torch.zeros(self.size.rows, *self.size.image, device="cpu")

    def labels(self) -> Tensor:
        return torch.zeros(self.size.rows, dtype=torch.long, device="cpu")


def _vocabulary(backbone: Any) -> int:
    """How many tokens there are; few where the backbone does not say."""
    config = getattr(backbone, "config", None)
    text = config.get_text_config() if config is not None else None
    return int(getattr(text, "vocab_size", None) or 8)


def _trained(texts: Mapping[str, Tensor]) -> Tensor:
    """Every token as its own label, but for padding."""
    return texts["input_ids"].masked_fill(texts["attention_mask"] == 0, IGNORED)


def _classes(task: Any, sizes: _Sizes) -> dict[str, Any]:
    return {**sizes.texts(), "labels": sizes.labels()}


def _numbers(task: Any, sizes: _Sizes) -> dict[str, Any]:
    return {**sizes.texts(), "labels": sizes.labels().float()}


def _several(task: Any, sizes: _Sizes) -> dict[str, Any]:
    return {**sizes.texts(), "labels": torch.zeros(sizes.size.rows, task.num_classes, device="cpu")}


def _tags(task: Any, sizes: _Sizes) -> dict[str, Any]:
    texts = sizes.texts()
    return {**texts, "labels": (texts["attention_mask"] - 1) * -IGNORED}


def _language(task: Any, sizes: _Sizes) -> dict[str, Any]:
    texts = sizes.texts()
    if not sizes.size.packed:
        return {**texts, "labels": _trained(texts)}
    ids = texts["input_ids"]
    half = ids.shape[1] // 2 or 1
    positions = torch.arange(ids.shape[1], device="cpu").expand_as(ids) % half
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": positions}


def _source_and_target(task: Any, sizes: _Sizes) -> dict[str, Any]:
    target = sizes.texts(length=sizes.size.target_length or sizes.size.length)
    return {**sizes.texts(), "labels": _trained(target)}


def _answers(task: Any, sizes: _Sizes) -> dict[str, Any]:
    texts = sizes.texts(rows=2 * sizes.size.rows)
    return {**texts, "labels": _trained(texts)}


def _parts(task: Any, sizes: _Sizes) -> dict[str, Any]:
    groups = torch.full((sizes.size.rows, 1), -1, device="cpu")
    if sizes.size.image is not None:
        return {**sizes.texts(), PIXELS: sizes.images(), "labels": groups}
    return {"anchor": sizes.texts(), "positive": sizes.texts(), "labels": groups}


def _images(task: Any, sizes: _Sizes) -> dict[str, Any]:
    return {PIXELS: sizes.images(), "labels": sizes.labels()}


def _masks(task: Any, sizes: _Sizes) -> dict[str, Any]:
    pixels = sizes.images()
    labels = torch.zeros(len(pixels), *pixels.shape[2:], dtype=torch.uint8, device="cpu")
    return {PIXELS: pixels, "labels": labels}


MAKERS: dict[type[Task], Callable[[Any, _Sizes], dict[str, Any]]] = {
    SequenceClassification: _classes,
    SequenceRegression: _numbers,
    MultiLabelClassification: _several,
    TokenClassification: _tags,
    CausalLM: _language,
    TextGeneration: _language,
    SequenceToSequence: _source_and_target,
    PreferenceTuning: _answers,
    ContrastiveEmbedding: _parts,
    ImageClassification: _images,
    ImageSegmentation: _masks,
}
