"""Counts the memory and the operations of a piece of code at torch's dispatcher, with stand-ins in place of W0.

A stand-in (torch's FakeTensor) has a shape, a dtype and a device, and no values. Each storage of an operation's result
is added to the sum, and subtracted when it is freed, which happens at the same moments with stand-ins as with real
tensors: autograd frees saved tensors node by node, Python the rest. So the largest sum is the peak of an allocator
without waste. Memory within a kernel is not counted.

Tensors that depend on the batch alone, such as masks and positions, are computed for real: they are small, and models
branch on their values. Tensors that depend on W0 are stand-ins.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# FakeTensor is private, and its modes are in torch.utils under a private name: torch has no public tensors without data
# that keep their device, as the meta device's do not, on which the choice of kernels depends.
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lora_lightning.tasks.base import tensors_in

__all__ = ["FakeTensor", "FakeTensorMode", "MemoryTracker", "bytes_of", "fake_mode", "put_stand_ins"]

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


def fake_mode() -> FakeTensorMode:
    """The mode in which operations on stand-ins return stand-ins; real tensors among them count by their shape."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def put_stand_ins(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    """Replace every parameter and buffer on the meta device by a stand-in on `device`; ties stay.

    Real tensors, such as buffers that a model computes, stay.
    """
    stand_ins: dict[int, tuple[Tensor, Any]] = {}  # with the original, so that its id stays taken
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in stand_ins:
                    with mode:
                        like: Any = torch.empty_strided(
                            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
                        )
                    if isinstance(tensor, nn.Parameter):
                        like = nn.Parameter(like, requires_grad=tensor.requires_grad)
                    stand_ins[id(tensor)] = tensor, like
                store[name] = stand_ins[id(tensor)][1]  # type: ignore[index]


def bytes_of(tensors: Iterable[Any]) -> int:
    """Bytes of tensors together, each storage once."""
    storages = {id(s): s for s in (t.untyped_storage() for t in tensors if isinstance(t, Tensor))}
    return sum(storage.nbytes() for storage in storages.values())


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes in memory and the floating-point operations of all that runs within.

    Args:
        known: tensors that exist already, which are not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.flops = 0
        self.curve: list[int] = []
        """Bytes in memory after each operation."""
        self._answers = 0
        self._known = [tensor.untyped_storage() for tensor in known]
        # A storage is one Python object as long as it lives.
        self._storages: dict[int, Any] = {id(storage): None for storage in self._known}

    def curve_since_last(self) -> list[int]:
        """Bytes in memory after each operation since the last call."""
        curve, self.curve = [*self.curve, self.now], []
        return curve

    @contextmanager
    def answer_ones(self) -> Iterator[None]:
        """Within the block, the value of a stand-in reads as 1, as for an optimizer's count of steps."""
        self._answers += 1
        try:
            yield
        finally:
            self._answers -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        if func is aten._local_scalar_dense.default and self._answers and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1
        if _is_of_the_batch(func, args, kwargs):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        for tensor in tensors_in(out):
            self._note(tensor)
        self.curve.append(self.now)
        formula = FLOPS.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return
        tracker_ref = weakref.ref(self)

        def free(_: Any) -> None:
            tracker = tracker_ref()
            if tracker is not None and tracker._storages.pop(key, None) is not None:
                tracker.now -= size

        self._storages[key] = weakref.ref(storage, free)
        self.now += size


def _is_of_the_batch(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether nothing in this operation depends on W0, so that it can be computed for real."""
    tensors = list(tensors_in((args, kwargs)))
    if tensors:
        return all(not isinstance(t, FakeTensor) and t.numel() <= REAL_AT_MOST for t in tensors)
    dtype = kwargs.get("dtype")
    return func.overloadpacket in WHOLE if dtype is None else not dtype.is_floating_point
