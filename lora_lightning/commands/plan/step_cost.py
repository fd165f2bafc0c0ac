"""The cost of one training step, counted at torch's dispatcher, with stand-ins in place of W0.

A stand-in (torch's FakeTensor) has a shape, a dtype and a device, and no values. Each storage of an operation's result
is added to the sum, and subtracted when it is freed, which happens at the same moments with stand-ins as with real
tensors: autograd frees saved tensors node by node, Python the rest. So the largest sum is the peak of an allocator
without waste. Memory within a kernel is not counted.

Tensors that depend on the batch alone, such as masks and positions, are computed for real: they are small, and models
branch on their values. Tensors that depend on W0 are stand-ins.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# FakeTensor is private, and its modes are in torch.utils under a private name: torch has no public tensors without data
# that keep their device, as the meta device's do not, on which the choice of kernels depends.
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lora_lightning.lora.layers.tracing import tracing
from lora_lightning.tasks.base import tensors_in

aten: Any = torch.ops.aten

WHOLE = (aten.arange, aten.randint, aten.randperm)
"""Operations that return integers where no dtype is set."""
REAL_AT_MOST = 2**24
"""Elements up to which a tensor is computed for real; larger ones are stand-ins."""

FLASH = "_scaled_dot_product_flash_attention"
ALIKE = {"addmm_": "addmm", "baddbmm_": "baddbmm"}
ALIKE |= {f"{FLASH}_for_cpu{end}": f"{FLASH}{end}" for end in ("", "_backward")}
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    **{getattr(aten, name): flop_registry[getattr(aten, like)] for name, like in ALIKE.items()},
}
"""torch's formulas, which count a multiplication and an addition as two, and four operations that its table lacks."""


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
    device: torch.device,
) -> StepCost:
    """Run a step of `model` on `device`, with stand-ins in place of its tensors on the meta device.

    As in Lightning, the gradients of the step before are freed between forward and backward.

    Args:
        loss: runs forward on a real batch.
        make_optimizer: over what trains.

    Raises:
        Exception: whatever a forward raises that reads values of stand-ins.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # real tensors among stand-ins count by their shape
    put_stand_ins(model, mode, device)
    weights = [*model.parameters(), *model.buffers()]
    trained = [p for p in model.parameters() if p.requires_grad]
    with tracing(FakeTensor), mode, MemoryTracker(weights) as tracker:
        optimizer = make_optimizer()
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        tracker.step(optimizer)  # makes its state
        tracker.lap()
        before = tracker.now
        out = loss()
        kept = tracker.now - before
        forward_curve, forward = tracker.lap()
        optimizer.zero_grad()
        torch.autograd.backward(out)
        backward_curve, backward = tracker.lap()
        del out
        tracker.step(optimizer)
        step_curve, _ = tracker.lap()
    return StepCost(
        weights=bytes_of(weights),
        gradients=bytes_of(trained),
        optimizer=bytes_of(tensors_in(list(optimizer.state.values()))),
        kept=kept,
        in_forward=max(forward_curve),
        in_backward=max(backward_curve),
        in_step=max(step_curve),
        forward=forward,
        backward=backward,
        curves=(forward_curve, backward_curve),
    )


def put_stand_ins(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    """Replace every parameter and buffer on the meta device by a stand-in on `device`; ties stay.

    Real tensors, such as buffers that a model computes, stay.
    """
    stores: list[dict[str, Any]] = [s for module in model.modules() for s in (module._parameters, module._buffers)]
    places = [(s, name, t) for s in stores for name, t in s.items() if t is not None and t.is_meta]
    stand_ins: dict[int, Tensor] = {}
    for store, name, tensor in places:
        if id(tensor) not in stand_ins:
            with mode:
                like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            stand_ins[id(tensor)] = nn.Parameter(like, tensor.requires_grad) if is_parameter else like
        store[name] = stand_ins[id(tensor)]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors together, each storage once."""
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes in memory and the floating-point operations of all that runs within.

    Args:
        known: tensors that exist already, which are not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self._flops = 0
        self._curve: list[int] = []
        self._answers = False
        self._known = [tensor.untyped_storage() for tensor in known]
        self._alive = {id(storage) for storage in self._known}  # a storage is one Python object as long as it lives

    def lap(self) -> tuple[list[int], int]:
        """Bytes in memory after each operation, and the floating-point operations, since the last lap."""
        curve, flops = [*self._curve, self.now], self._flops
        self._curve, self._flops = [], 0
        return curve, flops

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer's step, in which the value of a stand-in, such as a count of steps, reads as 1."""
        self._answers = True
        optimizer.step()
        self._answers = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        if func is aten._local_scalar_dense.default and self._answers and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1
        with unset_fake_temporarily() if _is_of_the_batch(func, args, kwargs) else nullcontext():
            out = func(*args, **kwargs)
        for tensor in tensors_in(out):
            self._count(tensor.untyped_storage())
        self._curve.append(self.now)
        formula = FLOPS.get(func.overloadpacket)
        if formula is not None:
            self._flops += formula(*args, **kwargs, out_val=out)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.now += size
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._alive.remove(key)
        self.now -= size


def _is_of_the_batch(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether nothing in this operation depends on W0, so that it can be computed for real."""
    tensors = list(tensors_in((args, kwargs)))
    if tensors:
        return all(not isinstance(t, FakeTensor) and t.numel() <= REAL_AT_MOST for t in tensors)
    dtype = kwargs.get("dtype")
    return func.overloadpacket in WHOLE if dtype is None else not dtype.is_floating_point
