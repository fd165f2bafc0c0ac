"""One heap for all threads, so that fits that take turns need one fit's memory."""

from __future__ import annotations

import ctypes
import functools
import sys

M_ARENA_MAX = -8
"""Of glibc's malloc.h."""


@functools.cache
def share_heap() -> None:
    """Let new threads allocate from the existing heaps, where the C library is glibc.

    By default glibc gives each thread a heap, which keeps freed memory: eight fits then hold eight fits' activations.
    Only one fit runs at a time, so that one heap serves all. Heaps of earlier threads stay: call this first in a
    process.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        libc.mallopt(M_ARENA_MAX, 1)
