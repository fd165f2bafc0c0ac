"""What a fit reads from its data, here without data: from the config, from a flag, or assumed with a note."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from lora_lightning.commands.plan.dummy_batch import IMAGE_TASKS, BatchSize
from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import Task
from lora_lightning.tasks.contrastive import ContrastiveEmbedding

ASSUMED_LABELS = 2
ASSUMED_SIDE = 224
ASSUMED_LENGTH = 512
ASSUMED_ROWS = 8

Notes = list[str]
"""The assumptions, in order."""


def labels_in(data: Any, num_labels: int | None, notes: Notes) -> list[str] | None:
    """Label names as the data would have them; None where the set has none.

    Args:
        data: the data's section of the config, which may be missing.
        num_labels: from `--num_labels`.
    """
    cls, args = _class_of(data), _args(data)
    names = [str(i) for i in range(num_labels)] if num_labels is not None else None
    if cls is not None and not isinstance(getattr(cls, "label_names", None), property):
        return names
    for name in ("label_names", "label_columns"):
        if args.get(name):
            return list(args[name])
    if names is not None:
        return names
    fixed = getattr(cls, "num_classes", None)
    count = args.get("num_classes") or (fixed if isinstance(fixed, int) else None)
    if count is None:
        count = ASSUMED_LABELS
        notes.append(f"{count} labels are assumed, which the data would tell: --num_labels gives their number")
    return [str(i) for i in range(int(count))]


def size_in(
    data: Any, task: Task, backbone: nn.Module, notes: Notes, *, batch_size: int | None, length: int | None
) -> BatchSize:
    """The size of a training batch: from the flags, else the config, else the backbone."""
    args = _args(data)
    rows = batch_size or args.get("batch_size")
    if rows is None:
        rows = ASSUMED_ROWS
        notes.append(f"{rows} rows in a batch are assumed, as the config names no batch_size: --batch_size")
    takes_images = isinstance(task, IMAGE_TASKS) or "image_column" in args
    with_texts = not takes_images or isinstance(task, ContrastiveEmbedding)
    return BatchSize(
        rows=int(rows),
        length=_length(args, backbone, notes, length) if with_texts else None,
        target_length=args.get("max_target_length"),
        image=_image(args, backbone, notes) if takes_images else None,
        packed=bool(args.get("packing")),
    )


def _length(args: dict[str, Any], backbone: Any, notes: Notes, length: int | None) -> int:
    tokens = length or args.get("max_length") or args.get("max_source_length")
    if tokens is None:
        config = getattr(backbone, "config", None)
        most = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
        tokens = min(most or ASSUMED_LENGTH, ASSUMED_LENGTH)
        notes.append(f"texts of {tokens} tokens are assumed, as the config names no max_length: --length")
    return int(tokens)


def _image(args: dict[str, Any], backbone: Any, notes: Notes) -> tuple[int, int, int]:
    config, timms = getattr(backbone, "config", None), getattr(backbone, "pretrained_cfg", None) or {}
    vision, timms_size = getattr(config, "vision_config", None) or config, timms.get("input_size") or (3,)
    size = args.get("image_size") or getattr(vision, "image_size", None) or list(timms_size[1:])
    if not size:
        size = ASSUMED_SIDE
        notes.append(f"images of {size} x {size} pixels are assumed, as neither config nor model name a size")
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return int(getattr(vision, "num_channels", None) or timms_size[0]), int(height), int(width)


def _args(data: Any) -> dict[str, Any]:
    args = None if data is None else data.get("init_args")
    return {} if args is None else dict(args.as_dict() if callable(getattr(args, "as_dict", None)) else args)


def _class_of(data: Any) -> type | None:
    if data is None or not data.get("class_path"):
        return None
    module, _, name = str(data["class_path"]).rpartition(".")
    cls = getattr(importlib.import_module(module), name, None)
    if not isinstance(cls, type):
        raise LoRAError(f"data.class_path: expected a class, got '{data['class_path']}'")
    return cls
