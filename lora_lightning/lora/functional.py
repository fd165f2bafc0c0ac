"""The arithmetic of LoRA as pure functions of tensors, written once.

Shapes: `n` rows, `k` inputs, `m` outputs, rank `r`; x is (..., k), W0 is (m, k), A is (r, k), B is (m, r).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def lora_update(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`s (x A^T) B^T`, in the dtype of x: the rank-sized factors are cast, never the input.

    Shapes: x (..., k), A (r, k), B (m, r); returns (..., m).
    """
    return F.linear(F.linear(x, A.to(x.dtype)) * scale, B.to(x.dtype))


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or wider where a tensor is: the dtype in which weights are added."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def lora_delta(A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`s B A`, the dense update (m, k): the one place in which it is formed, for a merge."""
    return (B.to(dtype) @ A.to(dtype)) * scale
