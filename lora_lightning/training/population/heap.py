"""One heap for all threads, so that fits that take turns need the memory of one."""

from __future__ import annotations

import ctypes
import functools
import sys

M_ARENA_MAX = -8
"""Of glibc's malloc.h."""


@functools.cache
def share_heap() -> None:
    """Let threads that begin from now on take memory from the heaps that there are, where the C library is glibc.

    It gives each thread a heap of its own, which keeps what was freed there: eight fits held the activations of eight.
    Only one of them runs at a time, so that one heap serves all. A heap that an earlier thread has begun stays: called
    first in a process, this leaves one. Elsewhere nothing is done.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        libc.mallopt(M_ARENA_MAX, 1)
