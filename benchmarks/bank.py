"""Swapping adapters and batches of several, beside PEFT, in one run.

    python -m benchmarks.bank [--repeats 15] [--width 512] [--rows 8] [--tokens 64]

Swaps: milliseconds to make another adapter, of another rank, the active one of 224 linear layers. Rows: a forward in
eval of a batch whose rows alternate between adapters, over the plain base's forward. Ours and PEFT's are interleaved in
random order; a figure is the median. Written to benchmarks/results/bank.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.measure import RESULTS
from lora_lightning import AdapterBank, LoRAConfig, inject, save_adapter


class Block(nn.Module):
    """The linear layers of a transformer block, without attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down, self.norm = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.output(torch.tanh(self.query(x)) * self.key(x) + self.value(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def model_of(width: int, blocks: int) -> nn.Module:
    return nn.Sequential(*(Block(width) for _ in range(blocks))).requires_grad_(False)


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


LINEARS = ["query", "key", "value", "output", "up", "down"]
NAMES = [f"p{i}" for i in range(7)]


def directories(base: nn.Module, targets: list[str], folder: Path, ranks: list[int]) -> dict[str, Path]:
    """Adapters of these ranks on disk, their B away from zero."""
    found = {}
    for i, r in enumerate(ranks):
        model = copy.deepcopy(base)
        inject(model, LoRAConfig(r=r, target_modules=targets))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.02)
        found[f"a{i}"] = save_adapter(model, folder / f"a{i}")
    return found


def peft_of(base: nn.Module, found: dict[str, Path]) -> nn.Module:
    from peft import PeftModel

    first, *rest = found
    model = PeftModel.from_pretrained(copy.deepcopy(base), found[first], adapter_name=first).eval()
    for name in rest:
        model.load_adapter(found[name], adapter_name=name)
    return model


def bank_of(base: nn.Module, found: dict[str, Path]) -> AdapterBank:
    bank = AdapterBank(copy.deepcopy(base))
    for name, directory in found.items():
        bank.load(name, directory)
    return bank


def interleaved(calls: dict[str, object], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, in random order; two rounds of warm-up are left out."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 2):
        for name in random.sample(list(calls), len(calls)):
            milliseconds = 1000 * timed(calls[name])
            if round_ >= 2:
                found[name].append(milliseconds)
    return found


def measure_swaps(repeats: int, folder: Path) -> dict[str, float]:
    base = nn.ModuleList(nn.ModuleDict({name: nn.Linear(64, 64) for name in NAMES}) for _ in range(32)).eval()
    found = directories(base, NAMES, folder, [8, 16])
    bank, other, turn = bank_of(base, found), peft_of(base, found), {"ours": 0, "peft": 0}

    def next_name(whose: str) -> str:
        turn[whose] += 1
        return f"a{turn[whose] % 2}"

    calls = {"ours": lambda: bank.activate(next_name("ours")), "peft": lambda: other.set_adapter(next_name("peft"))}
    times = interleaved(calls, repeats)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def measure_rows(options: argparse.Namespace, adapters: int, folder: Path) -> dict[str, float]:
    base = model_of(options.width, options.blocks).eval()
    found = directories(base, LINEARS, folder, [8] * adapters)
    bank, other = bank_of(base, found), peft_of(base, found)
    x = torch.randn(options.rows, options.tokens, options.width)
    names = [f"a{i % adapters}" for i in range(options.rows)]
    with bank.rows(names):
        difference = float((bank.model(x) - other(x, adapter_names=names)).abs().max())
        assert difference < 1e-3, difference
        calls = {
            "plain": lambda: base(x),
            "ours": lambda: bank.model(x),
            "peft": lambda: other(x, adapter_names=names),
        }
        times = interleaved(calls, options.repeats)
    return {
        name: statistics.median(t / plain for t, plain in zip(times[name], times["plain"], strict=True))
        for name in ("ours", "peft")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8, help="rows of the batch")
    parser.add_argument("--tokens", type=int, default=64, help="positions of each row")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        swaps = measure_swaps(options.repeats, Path(folder) / "swaps")
        rows = {n: measure_rows(options, n, Path(folder) / f"rows{n}") for n in (1, 2, 4, 8) if n <= options.rows}
    print(f"swap on 224 linears: ours {swaps['ours']:.1f} ms, PEFT's set_adapter {swaps['peft']:.1f} ms")
    print(f"{'adapters in one batch':24}{'ours over plain':>16}{'PEFT over plain':>17}")
    for n, ratios in rows.items():
        print(f"{n:<24}{ratios['ours']:16.2f}{ratios['peft']:17.2f}")
    where = {"machine": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    RESULTS.mkdir(exist_ok=True)
    report = where | vars(options) | {"swap, ms": swaps, "rows over plain, by adapters": rows}
    (RESULTS / "bank.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
