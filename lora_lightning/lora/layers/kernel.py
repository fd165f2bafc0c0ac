"""torch's fused attention for the CPU, step for step, with the projections left to the caller.

In eval without gradients torch computes self-attention by `torch._native_multi_head_attention`, which rounds otherwise
than the Python path. These are its operations in its order (ATen, native/transformers/attention.cpp), so that an
adapter which is still zero leaves every bit. Other devices have kernels of their own: there the Python path is taken,
right to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Private operators: in a version of torch that lacks one, adapted attention takes the Python path.
_OPERATORS = (
    "_transform_bias_rescale_qkv",
    "_masked_softmax",
    "_nested_tensor_softmax_with_shape",
    "_nested_view_from_buffer",
)


def possible(device: torch.device) -> bool:
    """Whether attention may be computed as the kernel does: it has no backward, and its steps differ by device."""
    return (
        device.type == "cpu"
        and torch.backends.mha.get_fastpath_enabled()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and all(name in vars(torch) for name in _OPERATORS)
    )


def takes(attention: nn.MultiheadAttention, inputs: tuple[Tensor, Tensor, Tensor], *masks: Tensor | None) -> bool:
    """Whether `nn.MultiheadAttention.forward` would hand these to its kernel, were nothing adapted."""
    query, key, value = inputs
    tensors = (query, attention.in_proj_weight, attention.in_proj_bias)
    return (
        possible(query.device)
        and query.dim() == 3
        and query is key is value
        and not attention.training
        and attention.batch_first
        and attention.num_heads % 2 == 0
        and all(tensor is not None and tensor.dtype == query.dtype for tensor in tensors)
        and attention.bias_k is None
        and attention.bias_v is None
        and not attention.add_zero_attn
        and all(mask is None or (mask.dtype == torch.bool and not query.is_nested) for mask in masks)
        and not torch.is_autocast_enabled()
        and not torch.overrides.has_torch_function(tensors)
    )


def takes_layer(layer: nn.TransformerEncoderLayer, activation: int, x: Tensor) -> bool:
    """Whether `nn.TransformerEncoderLayer.forward` would hand x to its kernel; `activation` is its 1 or 2 there."""
    attention = layer.self_attn
    return (
        takes(attention, (x, x, x))
        and bool(activation)
        and layer.norm1.eps == layer.norm2.eps
        and not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
    )


def as_bool(mask: Tensor | None) -> Tensor | None:
    """What the encoder's kernel makes of a mask of zeros and minus infinities.

    A mask of other numbers is left as it is, and is then added to the scores, as in training. The kernel would take
    every number but zero for minus infinity.
    """
    if mask is None or not mask.is_floating_point():
        return mask
    return mask.bool() if bool(((mask == 0) | mask.isneginf()).all()) else mask


def rows(x: Tensor) -> Tensor:
    """What a nested tensor holds, (rows, width)."""
    return x.contiguous().values().view(-1, x.size(-1))


def nested_like(x: Tensor, values: Tensor) -> Tensor:
    """The inverse of `rows`, in the shape of the nested x."""
    like = x.contiguous()
    shape = (like._nested_tensor_size(), like._nested_tensor_strides(), like._nested_tensor_storage_offsets())
    nested: Tensor = torch._nested_view_from_buffer(values.contiguous().view(-1), *shape)  # type: ignore[arg-type]
    return nested


def attend(
    x: Tensor,
    in_proj: Callable[[Tensor], Tensor],
    in_bias: Tensor,
    out_proj: Callable[[Tensor], Tensor],
    *,
    num_heads: int,
    mask: Tensor | None = None,
    mask_type: int | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention as the kernel computes it.

    Shapes: x (n, l, e), or nested; in_proj gives (..., 3 e) without the bias; mask as `merge_masks` makes it, of type
    1 (n, l) or 2 (n, heads, l, l); returns (n, l, e) and the weights (n, l, l), or (n, heads, l, l) unless averaged.
    """
    if not x.is_nested and x.numel() == 0:
        return torch.empty_like(x), None
    if x.is_nested:
        lengths = x._nested_tensor_size()[:, 0]
        kept = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        projected = in_proj(rows(x))
        qkv = projected.new_zeros(*kept.shape, projected.shape[-1])
        qkv[kept] = projected
    else:
        qkv = in_proj(x)
    q, k, v = torch._transform_bias_rescale_qkv(qkv, in_bias, num_heads)
    weights = _softmax(q @ k.mT, x, mask, mask_type)
    heads = (weights @ v).transpose(1, 2).flatten(2)
    if x.is_nested:
        return nested_like(x, out_proj(heads[kept])), None
    out = out_proj(heads.flatten(0, 1)).view(x.shape)
    if not need_weights:
        return out, None
    return out, weights.sum(1) / num_heads if average_attn_weights else weights


def _softmax(scores: Tensor, x: Tensor, mask: Tensor | None, mask_type: int | None) -> Tensor:
    if x.is_nested:
        shaped: Tensor = torch._nested_tensor_softmax_with_shape(scores, x)  # type: ignore[attr-defined]
        return shaped
    if mask is None:
        return F.softmax(scores, dim=-1)
    masked: Tensor = torch._masked_softmax(scores, mask.bool(), scores.dim() - 1, mask_type)
    return masked
