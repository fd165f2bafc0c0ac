"""The cost of one training step, traced on stand-ins: forward, backward and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.commands.plan.memory_tracker import FakeTensor, FakeTensorMode, MemoryTracker, bytes_of
from lora_lightning.lora.layers.tracing import tracing


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Bytes and operations of a step in which the optimizer's state exists already."""

    weights: int
    """All parameters and buffers, the adapter included."""
    gradients: int
    optimizer: int
    """Its state, such as AdamW's two moments."""
    kept: int
    """Saved for backward at the end of forward."""
    in_forward: int
    """Peak in forward beside the weights: gradients, optimizer, saved and temporary tensors."""
    in_backward: int
    in_step: int
    """The same in backward, and in the optimizer's step."""
    forward: int
    """Floating-point operations, a multiplication and an addition being two."""
    backward: int

    curves: tuple[list[int], list[int]] = field(repr=False, compare=False)
    """Bytes beside the weights after each operation of forward, and of backward."""

    @property
    def peak(self) -> int:
        """The largest number of bytes in memory."""
        return self.weights + max(self.in_forward, self.in_backward, self.in_step)

    @property
    def flops(self) -> int:
        """Operations of forward and backward."""
        return self.forward + self.backward

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        numbers = {name: getattr(self, name) for name in NUMBERS}
        return {**numbers, "peak": self.peak, "flops": self.flops}


NUMBERS = tuple(name for name in StepCost.__dataclass_fields__ if name != "curves")


def step_cost(
    model: nn.Module,
    loss: Callable[[], Tensor],
    make_optimizer: Callable[[], torch.optim.Optimizer],
    mode: FakeTensorMode,
    *,
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> StepCost:
    """Run a step of `model`, whose tensors are stand-ins.

    As in Lightning, the gradients of the step before are freed between forward and backward.

    Args:
        loss: runs forward on a real batch.
        make_optimizer: over what trains.
        forward_context: around forward, such as autocast.

    Raises:
        Exception: whatever a forward raises that reads values of stand-ins.
    """
    parameters, buffers = list(model.parameters()), list(model.buffers())
    trained = [p for p in parameters if p.requires_grad]
    with tracing(FakeTensor), mode, MemoryTracker([*parameters, *buffers]) as tracker:
        optimizer = make_optimizer()
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        gradients = bytes_of(p.grad for p in trained)
        with tracker.answer_ones():
            optimizer.step()
        state = bytes_of(_tensors_in(optimizer.state))
        before, tracker.flops = tracker.now, 0
        tracker.curve_since_last()
        with forward_context():
            out = loss()
        kept, forward, in_forward = tracker.now - before, tracker.flops, tracker.curve_since_last()
        optimizer.zero_grad()
        torch.autograd.backward(out)
        backward, in_backward = tracker.flops - forward, tracker.curve_since_last()
        del out
        with tracker.answer_ones():
            optimizer.step()
        in_step = max(tracker.curve_since_last())
    weights = bytes_of([*parameters, *buffers])
    return StepCost(
        weights=weights,
        gradients=gradients,
        optimizer=state,
        kept=kept,
        in_forward=max(in_forward),
        in_backward=max(in_backward),
        in_step=in_step,
        forward=forward,
        backward=backward,
        curves=(in_forward, in_backward),
    )


def _tensors_in(state: Any) -> list[Tensor]:
    return [value for values in state.values() for value in values.values() if isinstance(value, Tensor)]
