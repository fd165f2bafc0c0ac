"""A trace: a model's step run on stand-ins for its tensors, which have shapes, dtypes and a device and no numbers.

Within it the layers take the arithmetic that they would take with real tensors, so that what a step keeps and computes
can be counted without memory for W0. What is asked of numbers to choose between two ways, a stand-in cannot answer; so
in a trace the way is taken that such a check is there to confirm.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class _Trace(threading.local):
    kind: type[Tensor] | None = None
    """The class of the stand-ins, while a trace runs."""


_trace = _Trace()


@contextmanager
def tracing(kind: type[Tensor]) -> Iterator[None]:
    """Within the block, tensors of this class stand for ordinary ones."""
    before, _trace.kind = _trace.kind, kind
    try:
        yield
    finally:
        _trace.kind = before


def is_traced() -> bool:
    """Whether a trace runs in this thread."""
    return _trace.kind is not None


def is_ordinary(tensor: Any) -> bool:
    """Whether this is a tensor of torch's own class, in its data too, or stands for one."""
    return isinstance(tensor, Tensor) and _is_torchs(type(tensor)) and _is_torchs(type(tensor.data))


def _is_torchs(kind: type) -> bool:
    return kind in (Tensor, nn.Parameter) or (kind is _trace.kind and kind is not None)
