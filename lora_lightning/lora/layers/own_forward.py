"""What a subclass of `nn.Linear` computes in a forward of its own, which may normalize or quantize its weight."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.lora.frozen.quantization import scheme
from lora_lightning.lora.layers.class_swap import is_shard, own_class, own_forward_calls_super


@torch.no_grad()
def is_plain_linear(module: nn.Linear) -> bool:
    """Whether the layer computes `x W^T + b`: a forward that calls no `super()` is tried on two rows, in eval mode.

    Quantized weights, which a merge dequantizes or refuses, and weights without values are not tried.
    """
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    if own_forward_calls_super(own_class(type(module)), nn.Linear) or scheme(module) is not None:
        return True
    if weight.is_meta or is_shard(weight) or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return True
    layer = copy.copy(module)  # shares its tensors
    layer.training = False
    row = torch.linspace(-1.0, 2.0, weight.shape[1]).to(weight)  # not drawn: the seed stays
    x = torch.stack([row, -row])
    expected = F.linear(x, weight, bias)
    for rows in (x, x[None]):
        try:
            out = layer.forward(rows)
        except Exception:  # it wants inputs of other dimensions, or more of them
            continue
        is_alike = isinstance(out, Tensor) and out.numel() == expected.numel()
        return is_alike and bool((out.reshape(expected.shape) - expected).norm() <= 0.02 * expected.norm())
    return False
