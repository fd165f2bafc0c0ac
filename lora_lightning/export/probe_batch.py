"""The batch on which an export is proven: the DataModule's first, or one drawn from what the model's config says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from lora_lightning.export.compare import outputs
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.frozen.dtype import float_dtype
from lora_lightning.lora.targets.output_heads import is_a
from lora_lightning.training.drawing import ROWS, drawers

MOST_ROWS = 8
"""Of a DataModule's batch: the logits of a language model for a whole batch would not fit beside two models."""


@dataclass(frozen=True)
class Probe:
    """Arguments of the backbone by name, and where they are from."""

    inputs: dict[str, Any]
    source: str


def as_weights(backbone: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Floating-point inputs in the dtype of half-precision weights: outside of autocast layers take no other."""
    dtype = float_dtype(backbone)
    if dtype.itemsize > 2:
        return dict(inputs)
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def from_batch(batch: Mapping[str, Any]) -> Probe:
    """The first rows of a batch without its labels."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    rows = {len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()}
    if len(rows) == 1 and max(rows) > MOST_ROWS:
        n = max(rows)
        inputs = {
            key: value[:MOST_ROWS] if isinstance(value, Tensor | list | tuple) and _length(value) == n else value
            for key, value in inputs.items()
        }
    return Probe(inputs, "the data's first batch")


def _length(value: Tensor | list[Any] | tuple[Any, ...]) -> int:
    return 0 if isinstance(value, Tensor) and not value.dim() else len(value)


def draw(backbone: nn.Module, example: Any = None) -> Probe:
    """A batch for a model without data: `example`, or random numbers of the shapes that its config asks for.

    Args:
        backbone: the adapted model, which is asked whether it takes what was drawn.
        example: a LightningModule's `example_input_array`; the backbone's own counts too.

    Raises:
        LoRAError: neither says what the model takes, with what to give.
    """
    example = getattr(backbone, "example_input_array", None) if example is None else example
    device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
    if example is not None:
        return Probe(move_data_to_device(_named(backbone, example), device), "example_input_array")
    reasons = []
    for drawn in _candidates(backbone):
        try:
            batch = as_weights(backbone, {name: draw_one().to(device) for name, draw_one in drawn.items()})
            outputs(backbone, batch)
        except Exception as error:  # a model may refuse what it cannot use in any way that it likes
            reasons.append(f"{', '.join(drawn)}: {' '.join(str(error).split())[:120] or type(error).__name__}")
        else:
            return Probe(batch, "drawn from the model's config")
    tried = f" (tried {'; '.join(reasons)})" if reasons else ""
    raise LoRAError(
        f"there is no batch to prove the export on, and none could be drawn for {type(backbone).__name__}{tried}: give"
        " the config a data section, or the model an example_input_array"
    )


def _named(backbone: nn.Module, example: Any) -> dict[str, Any]:
    """A tensor, a tuple or a mapping as arguments by name."""
    if isinstance(example, Mapping):
        return dict(example)
    values = example if isinstance(example, tuple | list) else (example,)
    return dict(zip(_parameters(backbone), values, strict=False))


def _parameters(backbone: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, p in inspect.signature(backbone.forward).parameters.items() if p.kind in kinds]


def _candidates(backbone: nn.Module) -> Iterator[dict[str, Callable[[], Tensor]]]:
    """Batches to try, the likeliest first, by argument how to draw it."""
    generator = torch.Generator().manual_seed(0)
    taken = _parameters(backbone)
    if is_a(backbone, "transformers.modeling_utils"):
        known = {name: draw_one for name, draw_one in drawers(backbone.config, generator).items() if name in taken}
        main = str(backbone.main_input_name)
        with_main = [main, "decoder_input_ids", *(["attention_mask"] if main == "input_ids" else [])]
        for names in (with_main, list(known), [main]):
            if main in known:
                yield {name: known[name] for name in names if name in known}
    elif taken and (size := _image_size_of(backbone)):
        dtype = next((p.dtype for p in backbone.parameters() if p.is_floating_point()), torch.float32)
        yield {taken[0]: lambda: torch.randn(ROWS, *size, generator=generator).to(dtype)}


def _image_size_of(backbone: nn.Module) -> tuple[int, ...] | None:
    """(channels, height, width) of a timm or torchvision model's input."""
    if is_a(backbone, "timm."):
        size = dict(getattr(backbone, "pretrained_cfg", None) or {}).get("input_size")
        patches: Any = getattr(backbone, "patch_embed", None)
        own = getattr(patches, "img_size", None)  # where the model was made for another size than its weights
        channels = size[0] if size else 3
        return (channels, *own) if own else tuple(size) if size else (3, 224, 224)
    if is_a(backbone, "torchvision."):
        side = getattr(backbone, "image_size", 224)
        return (3, side, side)
    return None
