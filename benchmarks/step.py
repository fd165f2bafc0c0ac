"""Time and saved bytes of one training step, beside the frozen step, PEFT and loralib, in one run.

    python -m benchmarks.step [--repeats 15] [--width 384] [--tokens 2048]

The frozen step is forward plus dX of the frozen backbone: no method that carries gradients to the first layer can be
quicker. Variants are interleaved in random order; a figure is the median of the paired ratios. Written to
benchmarks/results/step.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from torch import nn

from lora_lightning import LoRAConfig, inject, merge

RESULTS = Path(__file__).parent / "results"


class Block(nn.Module):
    """The linear layers of a transformer block, without attention: where LoRA costs, and nothing else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down, self.norm = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.output(torch.tanh(self.query(x)) * self.key(x) + self.value(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def model_of(width: int, blocks: int) -> nn.Module:
    return nn.Sequential(*(Block(width) for _ in range(blocks))).requires_grad_(False)


def ours(base: nn.Module) -> nn.Module:
    inject(
        base,
        LoRAConfig(
            r=8, target_modules="|".join(r".*\." + n for n in ("query", "key", "value", "output", "up", "down"))
        ),
    )
    return base


def peft(base: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    names = ["query", "key", "value", "output", "up", "down"]
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=names))


def loralib(base: nn.Module) -> nn.Module:
    import loralib as lora

    for block in base:
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Linear):
                new = lora.Linear(layer.in_features, layer.out_features, r=8, lora_alpha=16)
                new.load_state_dict(layer.state_dict(), strict=False)
                setattr(block, name, new)
    lora.mark_only_lora_as_trainable(base)
    return base


def step(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    model(x).square().mean().backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes kept for backward beyond the parameters, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(kept.values())


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_steps(models: dict[str, nn.Module], x: torch.Tensor, repeats: int) -> dict[str, list[float]]:
    """Each variant's time over the frozen step's, round by round; two rounds of warm-up are left out."""
    optimizers: dict[str, torch.optim.Optimizer | None] = {}
    for name, model in models.items():
        trains = [p for p in model.parameters() if p.requires_grad]
        for parameter in trains:
            nn.init.normal_(parameter, std=0.01)  # B away from zero: what a step costs in mid-training
        optimizers[name] = torch.optim.AdamW(trains, lr=1e-6) if trains else None
    ratios: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(repeats + 2):
        order = random.sample(list(models), len(models))
        seconds = {name: timed(lambda n=name: step(models[n], x, optimizers[n])) for name in order}
        if round_ >= 2:
            for name in models:
                ratios[name].append(seconds[name] / seconds["frozen"])
    return ratios


def measure_injection(repeats: int) -> tuple[float, float]:
    """Milliseconds to inject into 32 blocks of 7 linears, and the median of the paired ratios to PEFT's time."""
    from peft import LoraConfig, get_peft_model

    names = [f"p{i}" for i in range(7)]
    blocks = nn.ModuleList(nn.ModuleDict({name: nn.Linear(64, 64) for name in names}) for _ in range(32))
    own, ratios = [], []
    for _ in range(repeats):
        first, second = copy.deepcopy(blocks), copy.deepcopy(blocks)
        own.append(timed(lambda model=first: inject(model, LoRAConfig(r=8, target_modules=names))))
        peft_time = timed(lambda model=second: get_peft_model(model, LoraConfig(r=8, target_modules=names)))
        ratios.append(own[-1] / peft_time)
    return 1000 * statistics.median(own), statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="rows of the input")
    options = parser.parse_args()
    torch.manual_seed(0)
    base = model_of(options.width, options.blocks)
    x = torch.randn(options.tokens, options.width, requires_grad=True)
    models = {"frozen": copy.deepcopy(base)}
    models |= {variant.__name__: variant(copy.deepcopy(base)) for variant in (ours, peft, loralib)}
    ratios = measure_steps(models, x, options.repeats)
    frozen = saved_bytes(models["frozen"], x)
    rows = {
        name: {
            "step over frozen": statistics.median(ratios[name]),
            "spread": statistics.pstdev(ratios[name]),
            "saved bytes over frozen": saved_bytes(model, x) / frozen,
        }
        for name, model in models.items()
    }
    injection, injection_ratio = measure_injection(options.repeats)
    merge(models["ours"])
    with torch.no_grad():
        pairs = [timed(lambda: models["ours"](x)) / timed(lambda: models["frozen"](x)) for _ in range(options.repeats)]
    inference = statistics.median(pairs)
    print(f"{'':10}{'step over frozen':>18}{'spread':>9}{'saved bytes over frozen':>26}")
    for name, row in rows.items():
        print(f"{name:10}{row['step over frozen']:18.2f}{row['spread']:9.2f}{row['saved bytes over frozen']:26.2f}")
    print(f"injection of 224 linears: {injection:.1f} ms, {injection_ratio:.3f} of PEFT's time")
    print(f"merged inference over plain: {inference:.2f}")
    where = {"machine": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    found = {"rows": rows, "injection of 224 linears, ms": injection, "injection over PEFT's": injection_ratio}
    found |= {"merged inference over plain": inference}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "step.json").write_text(json.dumps(where | vars(options) | found, indent=2) + "\n")


if __name__ == "__main__":
    main()
