"""What DoRA, lora_bias, convolutions and embeddings cost beside the frozen step and PEFT, in one run.

    python -m benchmarks.forms [--quick] [--rounds 15] [--clock cpu] [--only dora]

As in benchmarks/step.py: r = 8, B away from zero, AdamW's step included, every figure a ratio to the frozen step, which
is forward plus dX. An embedding has no dX: its frozen step is the look-up and the norm behind it, forward and backward.
Written to benchmarks/results/forms.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from torch import Tensor, nn

from benchmarks.measure import CLOCKS, RESULTS, kept_bytes, machine, paired, ratios
from benchmarks.models import ALPHA
from lora_lightning import LoRAConfig, inject
from lora_lightning.lora.layers.fused_linear import eager_arithmetic

R = 8
WIDTH, TOKENS = 768, (16, 128)
IMAGES = (8, 64, 28, 28)


class Form(NamedTuple):
    """A backbone and the options under which it is adapted; ours and PEFT's have the same names."""

    make: Callable[[], nn.Module]
    adapted: type[nn.Module]
    x: Callable[[], Tensor]
    options: dict[str, Any]


class Linears(nn.Module):
    """Query, key and value of one input, their sum through an output layer, and two feed-forward layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.o(self.q(h) + self.k(h) + self.v(h))
        out: Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return out


class LookedUp(nn.Module):
    """Word embeddings and the norm behind them, which has a backward even where nothing trains."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(30522, WIDTH, padding_idx=0), nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        looked_up = self.words(ids)
        out: Tensor = self.norm(looked_up if looked_up.requires_grad else looked_up.requires_grad_())
        return out


def convolutions(kernel: int) -> nn.Module:
    """Layers of the second stage of a ResNet, without what stands between them but the activation."""
    layers = [[nn.Conv2d(64, 64, kernel, padding=kernel // 2, bias=False), nn.ReLU()] for _ in range(4)]
    return nn.Sequential(*[module for pair in layers for module in pair])


def numbers(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*TOKENS, WIDTH).to(dtype).requires_grad_()


def images(order: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.randn(IMAGES).to(memory_format=order).requires_grad_()


def ids() -> Tensor:
    return torch.randint(0, 30522, TOKENS)


HALF, LAST = torch.bfloat16, torch.channels_last
FORMS: dict[str, Form] = {
    "dora": Form(Linears, nn.Linear, numbers, {"use_dora": True}),
    "dora, bfloat16 base": Form(lambda: Linears().to(HALF), nn.Linear, lambda: numbers(HALF), {"use_dora": True}),
    "lora_bias": Form(Linears, nn.Linear, numbers, {"lora_bias": True}),
    "conv 3x3": Form(lambda: convolutions(3), nn.Conv2d, images, {}),
    "conv 3x3, channels last": Form(
        lambda: convolutions(3).to(memory_format=LAST), nn.Conv2d, lambda: images(LAST), {}
    ),
    "conv 1x1": Form(lambda: convolutions(1), nn.Conv2d, images, {}),
    "conv 3x3, dora": Form(lambda: convolutions(3), nn.Conv2d, images, {"use_dora": True}),
    "embedding": Form(LookedUp, nn.Embedding, ids, {}),
    "embedding, dora": Form(LookedUp, nn.Embedding, ids, {"use_dora": True}),
}


def ways(form: Form) -> dict[str, nn.Module]:
    """The same backbone frozen, with our adapters, with ours by torch's own operations, and with PEFT's."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = form.make().eval().requires_grad_(False)
    names = [name for name, module in base.named_modules() if isinstance(module, form.adapted)]
    models = {name: copy.deepcopy(base) for name in ("frozen", "ours", "plain form")}
    for name in ("ours", "plain form"):
        inject(models[name], LoRAConfig(r=R, alpha=ALPHA, target_modules=names, **form.options))
    models["peft"] = get_peft_model(base, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=names, **form.options))  # type: ignore[arg-type,assignment]
    for model in models.values():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_A", "lora_B", "lora_embedding")):
                nn.init.normal_(parameter, std=0.01)
    return models


def measured(form: Form, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Time of each way's step and bytes that it keeps, over the frozen one's."""
    x, models = form.x(), ways(form)
    forwards: dict[str, Callable[[], Tensor]] = {name: lambda m=model: m(x) for name, model in models.items()}
    quick = forwards["plain form"]

    def plainly() -> Tensor:
        with eager_arithmetic():
            return quick()

    forwards["plain form"] = plainly
    calls: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        trains = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trains, lr=1e-6, fused=True) if trains else None
        calls[name] = lambda f=forwards[name], o=optimizer: step(f, x, o)
    found = ratios(paired(calls, options.rounds, CLOCKS[options.clock]), "frozen")
    kept = {name: kept_bytes(model, forwards[name]) for name, model in models.items()}
    return {
        name: {"time": found[name][0], "spread": found[name][1], "kept": kept[name] / kept["frozen"]} for name in models
    }


def step(forward: Callable[[], Tensor], x: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    forward().float().square().mean().backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    x.grad = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: minutes")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds of each figure")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--only", default="", help="forms whose name begins so")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.rounds = min(options.rounds, 5) if options.quick else options.rounds
    found: dict[str, Any] = {"machine": machine(), "options": vars(options), "over the frozen step": {}}
    for name, form in FORMS.items():
        if name.startswith(options.only):
            rows = found["over the frozen step"][name] = measured(form, options)
            cells = [f"{way} {r['time']:.3f} (±{r['spread']:.3f}), keeps {r['kept']:.2f}" for way, r in rows.items()]
            print(name, *cells[1:], sep="\n    ", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "forms.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
