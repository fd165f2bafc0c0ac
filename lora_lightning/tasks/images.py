"""How a backbone takes images: by `pixel_values` as transformers does, or as its first argument."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import inputs_of

PIXELS = "pixel_values"
"""Under which name a batch holds its images (n, channels, height, width)."""


def image_inputs(backbone: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The backbone's arguments by name: its images under the name that its own `forward` has for them.

    Raises:
        LoRAError: the batch is no mapping, or `forward` takes no argument that has a name.
    """
    inputs = inputs_of(batch, "labels")
    taken = inspect.signature(backbone.forward).parameters
    if PIXELS not in inputs or PIXELS in taken:
        return inputs
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    first = next((p.name for p in taken.values() if p.kind in named), None)
    if first is not None:
        return {first if key == PIXELS else key: value for key, value in inputs.items()}
    if any(p.kind == inspect.Parameter.VAR_KEYWORD for p in taken.values()):
        return inputs
    raise LoRAError(
        f"the forward of {type(backbone).__name__} names no argument, so images cannot be handed over by name: give it"
        " one, such as forward(self, pixel_values)"
    )
