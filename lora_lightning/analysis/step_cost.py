"""What one training step needs, found by running it on stand-ins: forward, backward and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lora_lightning.analysis.ledger import counting
from lora_lightning.analysis.stand_ins import bytes_of
from lora_lightning.lora.traced import traced


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Bytes and operations of a step in which the optimizer's state is there already."""

    weights: int
    """Of all parameters and buffers, the adapter included."""
    gradients: int
    optimizer: int
    """Its state, such as AdamW's two moments."""
    kept: int
    """For backward, when forward is through."""
    in_forward: int
    """Beside the weights, at most in forward: gradients, optimizer, what is kept, and what is there for a moment."""
    in_backward: int
    in_step: int
    """The same in backward, and in the optimizer's step."""
    forward: int
    """Floating-point operations, a multiplication and an addition being two."""
    backward: int

    @property
    def peak(self) -> int:
        """Bytes at most."""
        return self.weights + max(self.in_forward, self.in_backward, self.in_step)

    @property
    def flops(self) -> int:
        """Of forward and backward."""
        return self.forward + self.backward

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "peak": self.peak, "flops": self.flops}

    def deeper(self, other: StepCost, times: int) -> StepCost:
        """This one with `times` the difference to a step that is some blocks shorter added."""
        mine, theirs = asdict(self), asdict(other)
        return StepCost(**{name: value + times * (value - theirs[name]) for name, value in mine.items()})


def step_cost(
    model: nn.Module,
    loss: Callable[[], Tensor],
    make_optimizer: Callable[[], torch.optim.Optimizer],
    mode: FakeTensorMode,
    *,
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> StepCost:
    """Run a step of `model`, whose tensors are stand-ins.

    As Lightning has it: the gradients of the step before are let go between forward and backward.

    Args:
        loss: forward, on a real batch.
        make_optimizer: over what trains.
        forward_context: around forward, such as autocast.

    Raises:
        Exception: whatever a forward raises that asks stand-ins for numbers.
    """
    parameters, buffers = list(model.parameters()), list(model.buffers())
    trained = [p for p in parameters if p.requires_grad]
    with traced(FakeTensor), counting(mode, [*parameters, *buffers]) as ledger:
        optimizer = make_optimizer()
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        gradients = bytes_of(p.grad for p in trained)
        with ledger.answering_ones():
            optimizer.step()
        state = bytes_of(_tensors_in(optimizer.state))
        before, ledger.flops = ledger.now, 0
        ledger.peak_since_last()
        with forward_context():
            out = loss()
        kept, forward, in_forward = ledger.now - before, ledger.flops, ledger.peak_since_last()
        optimizer.zero_grad()
        torch.autograd.backward(out)
        backward, in_backward = ledger.flops - forward, ledger.peak_since_last()
        del out
        with ledger.answering_ones():
            optimizer.step()
        in_step = ledger.peak_since_last()
    weights = bytes_of([*parameters, *buffers])
    return StepCost(
        weights=weights,
        gradients=gradients,
        optimizer=state,
        kept=kept,
        in_forward=in_forward,
        in_backward=in_backward,
        in_step=in_step,
        forward=forward,
        backward=backward,
    )


def _tensors_in(state: Any) -> list[Tensor]:
    return [value for own in state.values() for value in own.values() if isinstance(value, Tensor)]
