"""What `nn.MultiheadAttention` computes between its projections, as a pure function.

torch's own `F.multi_head_attention_forward` takes weights, not projections: an update could enter there only as a
dense matrix, without dropout. The steps here are its, in its order, so that the numbers are the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def float_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask to add to scores: minus infinity where a boolean mask says True."""
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise TypeError(f"only bool and floating types of masks are supported, got {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def length_first(inputs: tuple[Tensor, Tensor, Tensor], batch_first: bool) -> tuple[list[Tensor], bool]:
    """(length, n, width) from any of torch's layouts; equal inputs stay one object where they do so in torch."""
    batched = inputs[0].dim() == 3
    if not batched:
        return [t.unsqueeze(1) for t in inputs], batched
    if not batch_first:
        return list(inputs), batched
    moved = {id(t): t.transpose(0, 1) for t in inputs}
    return [moved[id(t)] for t in inputs], batched


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out_proj: Callable[[Tensor], Tensor],
    *,
    num_heads: int,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    bias_k: Tensor | None = None,
    bias_v: Tensor | None = None,
    add_zero_attn: bool = False,
    dropout: float = 0.0,
    is_causal: bool = False,
    need_weights: bool = True,
    average_attn_weights: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention over projected inputs, then `out_proj`.

    Shapes: l target and s source positions, n in the batch, width e: q (l, n, e), k and v (s, n, e), attn_mask
    (l, s) or (n heads, l, s), key_padding_mask (n, s), both to be added; returns (l, n, e) and the weights
    (n, l, s), or (n, heads, l, s) unless averaged.
    """
    length, batch, width = q.shape
    if bias_k is not None and bias_v is not None:
        k, v = torch.cat([k, bias_k.repeat(1, batch, 1)]), torch.cat([v, bias_v.repeat(1, batch, 1)])
        attn_mask, key_padding_mask = _one_more(attn_mask), _one_more(key_padding_mask)
    head = (batch * num_heads, width // num_heads)
    q, k, v = (t.reshape(t.shape[0], *head).transpose(0, 1) for t in (q, k, v))
    if add_zero_attn:
        zeros = (k.shape[0], 1, k.shape[2])
        k, v = torch.cat([k, k.new_zeros(zeros)], dim=1), torch.cat([v, v.new_zeros(zeros)], dim=1)
        attn_mask, key_padding_mask = _one_more(attn_mask), _one_more(key_padding_mask)
    mask = _joined(attn_mask, key_padding_mask, batch, num_heads)
    if need_weights:
        heads, weights = _with_weights(q, k, v, mask, dropout)
        out = heads.transpose(0, 1).reshape(length * batch, width)
        weights = weights.view(batch, num_heads, length, k.shape[1])
        return out_proj(out).view(length, batch, width), weights.mean(dim=1) if average_attn_weights else weights
    if mask is not None:
        mask = mask.unsqueeze(0) if mask.shape[0] == 1 else mask.view(batch, num_heads, mask.shape[1], k.shape[1])
    q, k, v = (t.view(batch, num_heads, *t.shape[1:]) for t in (q, k, v))
    heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
    out = heads.permute(2, 0, 1, 3).reshape(batch * length, width)
    return out_proj(out).view(length, batch, width), None


def _with_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    q = q * math.sqrt(1.0 / float(q.shape[-1]))
    scores = torch.bmm(q, k.mT) if mask is None else torch.baddbmm(mask, q, k.mT)
    weights = F.softmax(scores, dim=-1)
    if dropout > 0.0:
        weights = F.dropout(weights, p=dropout)
    return torch.bmm(weights, v), weights


def _joined(attn_mask: Tensor | None, padding: Tensor | None, batch: int, num_heads: int) -> Tensor | None:
    """Both masks as one, (1 or n heads, l or 1, s)."""
    if attn_mask is not None and attn_mask.dim() == 2:
        attn_mask = attn_mask.unsqueeze(0)
    if padding is None:
        return attn_mask
    padding = (
        padding.view(batch, 1, 1, padding.shape[1]).expand(-1, num_heads, -1, -1).reshape(batch * num_heads, 1, -1)
    )
    return padding if attn_mask is None else attn_mask + padding


def _one_more(mask: Tensor | None) -> Tensor | None:
    """One more source position, which every target may see."""
    return None if mask is None else F.pad(mask, (0, 1))
