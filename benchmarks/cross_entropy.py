"""Time and peak memory of a language model's loss and the gradient of its hidden states, in one and the plain way.

    python -m benchmarks.cross_entropy [--tokens 2048] [--vocabulary 32000] [--width 576] [--rounds 7] [--clock cpu]

`plain` is head, float32 softmax and `F.cross_entropy`, as transformers has it; `in one` is `linear_cross_entropy`; and
`a third` is that with two thirds of the labels left out, as where a chat trains on its answers. W is frozen. Rounds are
interleaved in random order, and ratios are medians over rounds. Peak memory is what one call takes beyond what is there
before it: the process's resident set on a CPU (Linux), the allocator's count on a GPU. Written to
benchmarks/results/cross_entropy.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import CLOCKS, RESULTS, machine, paired, ratios
from lora_lightning.tasks.losses.linear_cross_entropy import linear_cross_entropy

MB = 1e6


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")


def in_one(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    head = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    head.weight = nn.Parameter(weight, requires_grad=False)
    return linear_cross_entropy(head, hidden, labels, len(weight)).loss


def variants(options: argparse.Namespace) -> dict[str, Callable[[], tuple[float, float]]]:
    """Each call gives the loss and the norm of the gradient."""
    generator = torch.Generator().manual_seed(0)
    device, dtype = options.device, getattr(torch, options.dtype)
    hidden = torch.randn(options.tokens, options.width, generator=generator).to(device, dtype).requires_grad_(True)
    weight = (torch.randn(options.vocabulary, options.width, generator=generator) * 0.02).to(device, dtype)
    labels = torch.randint(options.vocabulary, (options.tokens,), generator=generator).to(device)
    fewer = torch.where(torch.arange(options.tokens, device=device) % 3 == 0, labels, -100)

    def call(way: Callable[[Tensor, Tensor, Tensor], Tensor], y: Tensor) -> tuple[float, float]:
        loss = way(hidden, weight, y)
        (gradient,) = torch.autograd.grad(loss, hidden)
        return float(loss.detach()), float(gradient.float().norm())

    return {
        "plain": lambda: call(plain, labels),
        "in one": lambda: call(in_one, labels),
        "plain, a third": lambda: call(plain, fewer),
        "in one, a third": lambda: call(in_one, fewer),
    }


def peak(call: Callable[[], object]) -> float:
    """Bytes that a call takes beyond what is there before it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return float(torch.cuda.max_memory_allocated() - before)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not to be had for nothing
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _resident("VmRSS")
    call()
    return float(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    options = parser.parse_args()
    random.seed(0)
    calls = variants(options)
    results = {name: call() for name, call in calls.items()}
    bytes_ = {name: peak(call) for name, call in calls.items()}
    seconds = paired(calls, options.rounds, CLOCKS[options.clock])
    found = {}
    print(f"{'':18}{'peak MB':>9}{'s':>8}{'over plain':>12}{'loss':>15}{'|gradient|':>14}")
    for name, (ratio, _) in ratios(seconds, "plain").items():
        best = sorted(seconds[name])[len(seconds[name]) // 2]
        loss, norm = results[name]
        found[name] = {"peak": bytes_[name], "seconds": best, "over plain": ratio, "loss": loss, "gradient": norm}
        print(f"{name:18}{bytes_[name] / MB:9.0f}{best:8.2f}{ratio:12.2f}{loss:15.6f}{norm:14.8f}")
    RESULTS.mkdir(exist_ok=True)
    out = json.dumps({"machine": machine(), **vars(options), "found": found}, indent=2)
    (RESULTS / "cross_entropy.json").write_text(out + "\n")


if __name__ == "__main__":
    main()
