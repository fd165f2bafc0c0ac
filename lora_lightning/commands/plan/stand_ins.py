"""A model whose tensors are stand-ins: shapes, dtypes and a device, and no numbers (torch's FakeTensor)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


def stand_in_mode() -> FakeTensorMode:
    """Under which operations on stand-ins give stand-ins; a real tensor among them is taken by its shape."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def put_stand_ins(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    """In place of every parameter and buffer on the meta device, a stand-in on `device`; ties stay.

    Real tensors, such as buffers that a model computes for itself, stay what they are.
    """
    made: dict[int, tuple[Tensor, Any]] = {}  # with the original, so that its id stays taken
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = tensor, _stand_in(tensor, mode, device)
                store[name] = made[id(tensor)][1]  # type: ignore[index]


def _stand_in(tensor: Tensor, mode: FakeTensorMode, device: torch.device) -> Tensor:
    with mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def bytes_of(tensors: Any) -> int:
    """What distinct tensors take together, each storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(storages.values())
