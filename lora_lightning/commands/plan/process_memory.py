"""What a whole process takes on a CPU: the part that no trace of tensors sees, as it was fitted.

    process = base + FIRST_USE + SPREAD x tensors

`base` is measured where the plan is made: Python and the libraries that a fit loads too. The two constants were fitted
on fits of four models with the system's allocator (glibc), so that the largest relative error is least; `docs/plan.md`
has the figures, and `python -m benchmarks.plan` takes them again.
"""

from __future__ import annotations

import re
from pathlib import Path

FIRST_USE = 150_000_000
"""Bytes that a first step adds: pages of kernels' code, compiled kernels and their tables, threads, the trainer."""
SPREAD = 1.1
"""What the allocator holds for each byte that is asked for: pieces that no later tensor fits."""


def process_peak(tensors: int, base: int) -> int:
    """Bytes of the process at most, from those of its tensors and those of the process before there are any."""
    return round(base + FIRST_USE + SPREAD * tensors)


def resident() -> int | None:
    """Bytes of this process that are in memory now; None where the system does not say (it is no Linux)."""
    status = Path("/proc/self/status")
    found = re.search(r"^VmRSS:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.is_file() else None
    return int(found[1]) * 1024 if found else None
