"""How figures are taken: interleaved rounds, paired ratios, medians; and what backward keeps, to the byte."""

from __future__ import annotations

import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

RESULTS = Path(__file__).parent / "results"
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""`cpu` counts this process's own time, for a machine that others use too; it adds the threads' times up."""


def paired(calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each call, round by round in a new random order; two rounds of warm-up are left out."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 2):
        for name in random.sample(list(calls), len(calls)):
            _settle()
            start = clock()
            calls[name]()
            _settle()
            if round_ >= 2:
                seconds[name].append(clock() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], to: str) -> dict[str, tuple[float, float]]:
    """For each call the median of its ratio to another, round by round, and half the middle half's width."""
    found = {}
    for name, own in seconds.items():
        pairs = [a / b for a, b in zip(own, seconds[to], strict=True)]
        low, _, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else (pairs[0],) * 3
        found[name] = (statistics.median(pairs), (high - low) / 2)
    return found


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def kept_bytes(model: nn.Module, call: Callable[[], torch.Tensor]) -> int:
    """Bytes that one forward keeps for backward beyond what was there: all that it allocated and did not give back.

    Counted at the allocator, so whatever holds them: nodes of the graph, functions of one's own, or anything else. What
    is held is the graph alone; the output is let go, unless the graph keeps it too.
    """
    call()  # caches that a first call fills
    if next(model.parameters()).is_cuda:
        before = torch.cuda.memory_allocated()
        held = call().grad_fn
        kept = torch.cuda.memory_allocated() - before
    else:
        with _quiet(), torch.autograd.profiler.profile(profile_memory=True, use_kineto=False) as profile:
            held = call().grad_fn
        kept = sum(event.self_cpu_memory_usage for event in profile.function_events)
    assert held is not None
    return kept


@contextmanager
def _quiet() -> Iterator[None]:
    """Past some builds of torch's profiler, which write of each start to the standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def machine() -> dict[str, object]:
    """What the figures were taken on."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = lines[0].partition(":")[2].strip() if lines else processor
    found = {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | {"torch": torch.__version__, "python": platform.python_version()}
