"""A trace: a model's step run on fake tensors, which have shapes, dtypes and a device but no values.

In a trace the layers choose the arithmetic that they would choose for real tensors, so that a step's memory and
operations can be counted without memory for W0. A check that needs values cannot be made; a trace takes the branch that
such a check normally confirms.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class _Trace(threading.local):
    kind: type[Tensor] | None = None  # of the fake tensors, while a trace runs


_trace = _Trace()


@contextmanager
def tracing(kind: type[Tensor]) -> Iterator[None]:
    """Within the block, tensors of this class count as ordinary ones."""
    before, _trace.kind = _trace.kind, kind
    try:
        yield
    finally:
        _trace.kind = before


def is_traced() -> bool:
    """Whether a trace runs in this thread."""
    return _trace.kind is not None


def is_ordinary(tensor: Any) -> bool:
    """Whether the tensor and its data are of torch's plain classes, or of the trace's class."""
    known = (Tensor, nn.Parameter, _trace.kind)
    return isinstance(tensor, Tensor) and type(tensor) in known and type(tensor.data) in known
