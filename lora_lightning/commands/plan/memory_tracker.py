"""What a piece of code allocates and computes, counted at torch's dispatcher.

Every storage that an operation makes is noted when it appears and struck off when it is freed, which happens at the
same moments with stand-ins as with real tensors: autograd frees what it kept node by node, Python the rest. So the
highest sum is what an allocator without waste would need at most. Not seen is what a kernel allocates within itself.

What comes of the batch alone, such as masks and positions, is computed for real: it is small, and models ask its values
which way to go. What comes of W0 is a shape.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten: Any = torch.ops.aten

WHOLE = (aten.arange, aten.randint, aten.randperm)
"""What makes whole numbers where no dtype is given."""
REAL_AT_MOST = 2**24
"""Elements of what is computed for real; larger it is a stand-in."""

FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
"""torch's own formulas, a multiplication and an addition as two, and four operations that its table leaves out."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes held, and floating-point operations, of all that runs within.

    Args:
        known: tensors that were there before, which are not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.flops = 0
        self.curve: list[int] = []
        """Bytes held after each operation."""
        self._storages: dict[int, Any] = {}
        self._answers = 0
        self._known = [tensor.untyped_storage() for tensor in known]
        for storage in self._known:
            self._storages[storage._cdata] = None

    def curve_since_last(self) -> list[int]:
        """Bytes held after each operation since this was asked last."""
        curve, self.curve = [*self.curve, self.now], []
        return curve

    @contextmanager
    def answering_ones(self) -> Iterator[None]:
        """Within the block, a stand-in that is asked for its number says 1: an optimizer counts its steps so."""
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
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        self.curve.append(self.now)
        formula = FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        here = weakref.ref(self)

        def freed(_: Any) -> None:
            own = here()
            if own is not None and own._storages.pop(key, None) is not None:
                own.now -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.now += size


def _is_of_the_batch(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether nothing in this operation comes of W0, so that it can be done for real."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if tensors:
        return all(not isinstance(t, FakeTensor) and t.numel() <= REAL_AT_MOST for t in tensors)
    dtype = kwargs.get("dtype")
    return func._overloadpacket in WHOLE if dtype is None else not dtype.is_floating_point


@contextmanager
def counting(mode: FakeTensorMode, known: Iterable[Tensor] = ()) -> Iterator[Ledger]:
    """Within the block, all that runs is written into the ledger."""
    ledger = Ledger(known)
    with mode, ledger:
        yield ledger
