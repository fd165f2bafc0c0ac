"""What trains in a sharded module, and its optimizer's state: gathered for a file, and put back into the shards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from lora_lightning.lora.frozen.tensors import frozen_keys, plain_name
from lora_lightning.training.distributed import rank
from lora_lightning.training.initialization import PREFIX
from lora_lightning.training.layout import laid_as


def trained_state(module: nn.Module) -> dict[str, Any]:
    """The module's state without W0, in the order of a single process; what is sharded, as it lies."""
    backbone = module.get_submodule(PREFIX.removesuffix("."))
    frozen = {PREFIX + key for key in frozen_keys(backbone)}
    return {key: value for key, value in module.state_dict().items() if plain_name(module, key) not in frozen}


def whole_state(state: Any) -> Any:
    """Every sharded tensor of a nested state gathered, one at a time, and kept by process 0; {} in the others.

    All processes must call it. A copy on the CPU, which the next step does not write into.
    """
    found = _mapped(state)
    return found if rank() == 0 else {}


def _mapped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mapped(inner) for inner in value]
    if not isinstance(value, Tensor):
        return value
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().cpu() if rank() == 0 else None


def as_held(value: Any, like: Any) -> Any:
    """A whole tensor in the parts of the parameter that it belongs to; scalars and what is no tensor as they are.

    A state of another shape, as a factored second moment's row, is laid into every process whole.
    """
    if not isinstance(value, Tensor) or isinstance(value, DTensor) or not isinstance(like, DTensor) or not value.dim():
        return value
    with torch.no_grad():
        if value.shape == like.shape:
            return laid_as(value, like)
        placements = [Replicate()] * like.device_mesh.ndim
        return distribute_tensor(value.to(like.device), like.device_mesh, placements, src_data_rank=None)
