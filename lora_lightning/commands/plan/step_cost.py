"""What one training step needs, found by running it on stand-ins: forward, backward and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lora_lightning.commands.plan.memory_tracker import counting
from lora_lightning.commands.plan.stand_ins import bytes_of
from lora_lightning.lora.layers.tracing import traced


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

    curves: tuple[list[int], list[int]] = field(repr=False, compare=False)
    """Bytes beside the weights after each operation of forward, and of backward."""

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
        own = {name: getattr(self, name) for name in NUMBERS}
        return {**own, "peak": self.peak, "flops": self.flops}

    def deeper(self, other: StepCost, times: int) -> StepCost:
        """Of a model with `times` more blocks than this one's, each alike, where `other` is of one block less.

        Sums grow by as much with each block. So does what is held at each moment after the last block's forward began
        and until its backward ends, which is when most is held; the most of all is at another moment in a deep model
        than in a shallow one, so moments are compared one by one.
        """
        found = {n: getattr(self, n) + times * (getattr(self, n) - getattr(other, n)) for n in NUMBERS}
        (forward, backward), (forward_less, backward_less) = self.curves, other.curves
        found["in_forward"] = _most(forward[::-1], forward_less[::-1], times)
        found["in_backward"] = _most(backward, backward_less, times)
        return StepCost(**found, curves=self.curves)


NUMBERS = tuple(name for name in StepCost.__dataclass_fields__ if name != "curves")


def _most(longer: list[int], shorter: list[int], times: int) -> int:
    """At most, of the moments on the last block's side, counted from it."""
    of_a_block = len(longer) - len(shorter)
    there = min(len(shorter), max(1, len(shorter) - of_a_block))
    return max(a + times * (a - b) for a, b in zip(longer[:there], shorter[:there], strict=True))


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
        ledger.curve_since_last()
        with forward_context():
            out = loss()
        kept, forward, in_forward = ledger.now - before, ledger.flops, ledger.curve_since_last()
        optimizer.zero_grad()
        torch.autograd.backward(out)
        backward, in_backward = ledger.flops - forward, ledger.curve_since_last()
        del out
        with ledger.answering_ones():
            optimizer.step()
        in_step = max(ledger.curve_since_last())
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
    return [value for own in state.values() for value in own.values() if isinstance(value, Tensor)]
