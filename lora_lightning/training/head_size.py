"""A head, or a number of classes, that is another than the data want, found before a fit begins."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lora_lightning.lora.errors import LoRAError, some
from lora_lightning.tasks.base import Task


def refuse_other_count(config: Any, data: Any) -> None:
    """What the data say of themselves is handed to the model, and wins over what a config says without a word.

    A class of the user's own may have a default, which stands in the config too: then nobody has asked for it.

    Raises:
        LoRAError: another `num_classes` of the task or the backbone than the data have labels.
    """
    for part in ("task", "backbone"):
        given = config.get(f"model.{part}.init_args.num_classes")
        ours = str(config.get(f"model.{part}.class_path")).startswith("lora_lightning.")
        if not ours or given is None:
            continue  # nor are the data asked, which may not know before their setup
        count = getattr(data, "num_classes", None)
        if count is not None and given != count:
            raise LoRAError(
                f"model.{part}.init_args.num_classes is {given}, and the data have {count} labels: leave it out"
            )


def refuse_other_size(backbone: nn.Module, task: Task, data: Any = None) -> None:
    """Compare the outputs of a transformers model's head with those that the task asks for.

    Of other backbones, and of a head in which no layer's size says it, the first batch tells.

    Args:
        data: whose label names the message lists.

    Raises:
        LoRAError: there are fewer or more, with both numbers.
    """
    count = task.wanted_outputs()
    if count is None or not isinstance(backbone, PreTrainedModel):
        return
    sizes = _sizes_beside_the_body(backbone)
    if not sizes or count in sizes:
        return
    label_names = getattr(data, "label_names", None) or ()
    named = f" ({some(list(label_names), 5)})" if label_names else ""
    own = backbone.config.num_labels if backbone.config.num_labels in sizes else sizes[-1]
    raise LoRAError(
        f"the backbone's head has {own} outputs (num_labels), and there must be {count}, one for each"
        f" {task.output_is}{named}: {'leave num_labels out' if label_names else f'num_labels: {count}'}"
    )


def _sizes_beside_the_body(backbone: PreTrainedModel) -> list[int]:
    """Outputs of the layers of the head, the last at the end; a model that is all body has none."""
    body = f"{backbone.base_model_prefix}."
    named = dict(backbone.named_modules())
    if body.rstrip(".") not in named:
        return []
    beside = [module for name, module in named.items() if not f"{name}.".startswith(body)]
    layers = [module for module in beside if isinstance(module, nn.Linear | nn.Conv2d)]
    return [layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels for layer in layers]
