"""What the processes of one tensor-parallel group tell each other in a layer's forward and backward.

Outside of the split layers every process of a group holds the same: the activation whole, and the whole gradient of it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from lora_lightning.lora.layers.fused_linear import drops_by_bytes

drawn: Any = None


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        return _sum(part, group)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.own, ctx.width = distributed.get_rank(group), part.shape[-1]
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
        distributed.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(-1, ctx.own * ctx.width, ctx.width), None


def _sum(part: Tensor, group: Any) -> Tensor:
    """A new tensor: what is added up may be another's too."""
    total = part.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=group)
    return total


def summed(part: Tensor, group: Any) -> Tensor:
    """The sum of all processes' parts, in each. The gradient of the sum is that of each part."""
    return _Summed.apply(part, group)  # type: ignore[no-any-return,no-untyped-call]


def joined(part: Tensor, group: Any) -> Tensor:
    """All processes' parts of the last dimension, one after another. Each part's gradient is its own of the whole."""
    return _Joined.apply(part, group)  # type: ignore[no-any-return,no-untyped-call]


class Copies:
    """What every process of a group has whole, for use by layers that are split.

    Backward adds up what all processes' layers say of it: once for all layers that read the same tensor one after the
    other, as a block's query, key and value do.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self._source: weakref.ref[Tensor] | None = None
        self._copy: Tensor | None = None
        self._state: Any = None

    def of(self, x: Tensor) -> Tensor:
        """The tensor itself, with that backward."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        # What is computed again in backward has a graph of its own, though its source may be the same tensor.
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        state = (x._version, torch._C._current_graph_task_id(), hooks)
        source = None if self._source is None else self._source()
        if source is not x or self._state != state or self._copy is None:
            self._copy = _Copied.apply(x, self.group)  # type: ignore[no-untyped-call]
            self._source, self._state = weakref.ref(x, self._forget), state
        return self._copy

    def _forget(self, _: Any) -> None:
        """The graph is held no longer than by the model."""
        self._source = self._copy = self._state = None


class PartOfDropout(nn.Dropout):
    """The dropout that a single process would have, of this process's part of the last dimension.

    Each process draws the mask of the whole and takes its own columns, so that all draw alike, and no two parts have
    the same mask.
    """

    def __init__(self, p: float, group: Any) -> None:
        super().__init__(p)
        self.count, self.own = group.size(), distributed.get_rank(group)

    def forward(self, x: Tensor) -> Tensor:
        """(..., part) to the same."""
        if not self.training or not self.p:
            return x
        width = x.shape[-1]
        whole = x.new_empty(x.numel() // width, width * self.count)
        drop = drawn(self.p) if drops_by_bytes(self.p) else None
        keep = whole.bernoulli_(1 - self.p) if drop is None else drop.keep(whole)
        scale = 1 / (1 - self.p) if drop is None else drop.scale
        return x * keep.narrow(-1, self.own * width, width).reshape(x.shape) * scale
