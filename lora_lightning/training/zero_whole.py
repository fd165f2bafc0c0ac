"""What DeepSpeed's stage 3 has cut into parts, made whole in one process: a tensor at a time, for files and digests."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, distributed, nn

from lora_lightning.training.distributed import processes, rank

PARTITIONED: WeakSet[nn.Module] = WeakSet()
"""The backbones that lie in parts."""


def zero_part(tensor: Tensor) -> Tensor | None:
    """What this process has of a parameter that DeepSpeed has cut, which it keeps as the parameter's `ds_tensor`."""
    part: Tensor | None = getattr(tensor, "ds_tensor", None)
    return None if part is None else part.data


def zero_whole(tensor: Any, to: int) -> Tensor | None:
    """The whole tensor in one process, and None in the others; all must call it. All parts are equally long."""
    part: Tensor = tensor.ds_tensor.data.contiguous()
    own = part.view(torch.uint8)  # gloo knows no bfloat16
    size, receives = own.numel(), to == rank()
    whole = torch.empty(processes() * size if receives else 0, dtype=torch.uint8, device=own.device)
    if processes() == 1:
        whole = own
    else:
        distributed.gather(own, list(torch.split(whole, size)) if receives else None, dst=to)
    return whole.view(part.dtype)[: tensor.ds_numel].view(tensor.ds_shape) if receives else None
