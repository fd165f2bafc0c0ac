"""How figures are taken: interleaved rounds, paired ratios, medians; and what backward keeps, to the byte."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable
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


def kept_bytes(model: nn.Module, call: Callable[[], object]) -> int:
    """Bytes that one forward keeps for backward beyond the parameters, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    held: list[torch.Tensor] = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())


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
