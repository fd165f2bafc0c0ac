"""What PEFT writes of W0 itself beside an adapter, compared with this model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError
from lora_lightning.lora.formats.peft.config import holder
from lora_lightning.lora.formats.peft.packing import PREFIX
from lora_lightning.lora.formats.peft.wrappers import is_trained_bias, unwrapped
from lora_lightning.lora.targets.output_heads import HF_MODEL, is_a


def without_base_copies(
    tensors: Mapping[str, Tensor], peft: dict[str, Any], model: nn.Module, *, allow_other_base: bool
) -> dict[str, Tensor]:
    """The file's tensors less what PEFT writes of W0 itself: embeddings and output layer, where they are adapted, were
    resized, or `save_embedding_layers` asked for them.

    Raises:
        AdapterError: such a matrix is not this model's, and `allow_other_base` is False.
    """
    own, listed = model.state_dict(), peft.get("modules_to_save") or []
    head = model.get_output_embeddings() if is_a(model, HF_MODEL) else None  # type: ignore[operator]
    modules = dict(model.named_modules(remove_duplicate=False))
    tables = {name for name, module in modules.items() if isinstance(module, nn.Embedding) or module is head}
    kept: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        full = key.removeprefix(PREFIX)
        name, wrappers = unwrapped(full, modules)
        here = own.get(name)
        if here is None or holder(name, listed) or is_trained_bias(full, peft, modules):
            kept[key] = tensor
        elif here.shape == tensor.shape and torch.equal(tensor.to(here.dtype), here.cpu()):
            continue
        elif not (name.endswith(".weight") and (wrappers or name.removesuffix(".weight") in tables)):
            kept[key] = tensor
        elif not allow_other_base:
            raise AdapterError(
                f"the adapter holds a weight of '{name.removesuffix('.weight')}' that is not this model's: load the"
                f" base that it was made on (resized as it was there), or pass allow_other_base=True to keep this"
                f" model's"
            )
    return kept
