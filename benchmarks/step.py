"""What a LoRA step costs beside the frozen step, PEFT, loralib and unsloth's algorithm, in one run.

    python -m benchmarks.step [--quick] [--rounds 15] [--curves] [--clock cpu] [--device cuda]

The frozen step is forward plus dX of the frozen backbone: nothing that carries gradients to the first layer can beat
it, and every figure is a ratio to it. r = 8 on all linear layers, B away from zero, AdamW's step included. Written to
benchmarks/results/step.json, and with --curves to curves.json and curves.svg.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from torch import nn

from benchmarks.measure import CLOCKS, RESULTS, kept_bytes, machine, paired, ratios
from benchmarks.models import BACKBONES, CUDA_BACKBONES, adapted, copied, run
from lora_lightning import LoRAConfig, inject, merge

SETTINGS: dict[str, tuple[torch.dtype, float]] = {
    "float32": (torch.float32, 0.0),
    "float32, dropout 0.1": (torch.float32, 0.1),
    "bfloat16 base, float32 adapters": (torch.bfloat16, 0.0),
}


def one_step(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    run(model, x).float().square().mean().backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    x.grad = None


def steps(models: dict[str, nn.Module], x: torch.Tensor, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Time and kept bytes of each variant's step over the frozen one's."""
    calls: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        trains = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trains, lr=1e-6, fused=True) if trains else None
        calls[name] = lambda m=model, o=optimizer: one_step(m, x, o)
    found = ratios(paired(calls, options.rounds, CLOCKS[options.clock]), "frozen")
    frozen = kept_bytes(models["frozen"], lambda: run(models["frozen"], x))
    return {
        name: {"time": found[name][0], "spread": found[name][1], "kept": kept_bytes(m, lambda m=m: run(m, x)) / frozen}
        for name, m in models.items()
    }


def step_table(options: argparse.Namespace) -> dict[str, Any]:
    """Every backbone, shape of batch and setting."""
    table: dict[str, Any] = {}
    backbones = CUDA_BACKBONES if options.device == "cuda" else BACKBONES
    settings = {"bfloat16 base, float32 adapters": SETTINGS["bfloat16 base, float32 adapters"]}
    for name, (make, width, names) in backbones.items():
        shapes = [(4, 2048)] if options.device == "cuda" else [(32, 64)] if options.quick else [(32, 64), (16, 128)]
        for batch, length in shapes:
            for setting, (dtype, dropout) in (settings if options.device == "cuda" else SETTINGS).items():
                torch.manual_seed(0)
                base, on_cuda = make().to(options.device, dtype), options.device == "cuda"
                models = adapted(base, names, dropout, with_compiled=on_cuda)
                x = torch.randn(batch, length, width, device=options.device).to(dtype).requires_grad_()
                rows = steps(models, x, options)
                table[f"{name}, {batch} x {length}, {setting}"] = rows
                show(f"{name}, {batch} x {length}, {setting}", rows)
    return table


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    cells = [f"{name} {row['time']:.3f} (±{row['spread']:.3f}), keeps {row['kept']:.2f}" for name, row in rows.items()]
    print(title, *(c for c in cells if not c.startswith("frozen ")), sep="\n    ", flush=True)


def injection(rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """224 linear layers of 64 x 64: milliseconds to inject, and the ratio to PEFT's time."""
    from peft import LoraConfig, get_peft_model

    names = [f"p{i}" for i in range(7)]

    def blocks() -> nn.Module:
        return nn.ModuleList(nn.ModuleDict({name: nn.Linear(64, 64) for name in names}) for _ in range(32))

    stock = {"ours": [blocks() for _ in range(rounds + 2)], "PEFT": [blocks() for _ in range(rounds + 2)]}
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: inject(stock["ours"].pop(), LoRAConfig(r=8, target_modules=names)),
        "PEFT": lambda: get_peft_model(stock["PEFT"].pop(), LoraConfig(r=8, target_modules=names)),  # type: ignore[arg-type]
    }
    seconds = paired(calls, rounds, clock)
    own = sorted(seconds["ours"])[rounds // 2]
    return {"milliseconds": 1000 * own, "over PEFT's": ratios(seconds, "PEFT")["ours"][0]}


def merged_inference(rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """One forward of the merged model over the plain one's."""
    make, width, names = BACKBONES["BERT width"]
    base = make()
    merged = copied(base)
    inject(merged, LoRAConfig(r=8, target_modules=list(names)))
    merge(merged)
    left = [m for m in merged.modules() if "LoRA" in type(m).__name__]
    x = torch.randn(8, 64, width)
    with torch.inference_mode():
        seconds = paired({"plain": lambda: run(base, x), "merged": lambda: run(merged, x)}, rounds, clock)
    return {"merged over plain": ratios(seconds, "plain")["merged"][0], "adapted layers left": len(left)}


def save_and_load(rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """224 linears of 576 x 576, r = 8: ours and PEFT's over the reading and writing of the same bytes alone.

    Ours takes W0's fingerprint in each, for which it reads all of W0; its time alone stands beside.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    from lora_lightning import load_adapter, save_adapter
    from lora_lightning.lora.frozen.fingerprint import fingerprint

    names = [f"p{i}" for i in range(7)]

    base = nn.ModuleList(nn.ModuleDict({name: nn.Linear(576, 576) for name in names}) for _ in range(32))

    def fresh() -> nn.Module:
        """New modules over the same W0."""
        return copy.deepcopy(base, {id(p): p for p in base.parameters()})

    model = fresh()
    inject(model, LoRAConfig(r=8, target_modules=names))
    peft = get_peft_model(fresh(), LoraConfig(r=8, target_modules=names))  # type: ignore[arg-type]
    stock = {way: [fresh() for _ in range(rounds + 2)] for way in ("load", "PEFT's load")}
    with tempfile.TemporaryDirectory() as folder:
        target, theirs, raw = Path(folder) / "adapter", Path(folder) / "peft", Path(folder) / "raw"
        save_adapter(model, target)
        data = (target / "adapter_model.safetensors").read_bytes()

        def write() -> None:
            with raw.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

        calls: dict[str, Callable[[], object]] = {
            "save": lambda: save_adapter(model, target),
            "PEFT's save": lambda: peft.save_pretrained(str(theirs)),
            "write": write,
            "read": raw.read_bytes,
            "load": lambda: load_adapter(stock["load"].pop(), target),
            "PEFT's load": lambda: PeftModel.from_pretrained(stock["PEFT's load"].pop(), str(theirs)),  # type: ignore[arg-type]
            "fingerprint of W0": lambda: fingerprint(model),
        }
        write()
        peft.save_pretrained(str(theirs))
        seconds = paired(calls, rounds, clock)
    middle = {name: 1000 * sorted(own)[len(own) // 2] for name, own in seconds.items()}
    return {f"{name}, milliseconds": value for name, value in middle.items()} | {
        "save over write": ratios(seconds, "write")["save"][0],
        "load over read": ratios(seconds, "read")["load"][0],
    }


def curves(options: argparse.Namespace) -> dict[str, list[tuple[int, float, float]]]:
    """Ours and PEFT's step over the frozen one's, against r, tokens and the number of adapted kinds of layer."""
    make, width, names = BACKBONES["MiniLM width"]
    points: dict[str, list[tuple[int, float, float]]] = {"r": [], "tokens": [], "adapted kinds of layer": []}

    def point(curve: str, at: int, r: int, tokens: int, chosen: tuple[str, ...]) -> None:
        torch.manual_seed(0)
        only = ("frozen", "ours", "peft")
        models = adapted(make(), chosen, 0.0, r=r, only=only)
        rows = steps(models, torch.randn(max(1, tokens // 64), min(64, tokens), width).requires_grad_(), options)
        points[curve].append((at, rows["ours"]["time"], rows["peft"]["time"]))
        print(f"    {curve} = {at}: ours {rows['ours']['time']:.3f}, PEFT {rows['peft']['time']:.3f}", flush=True)

    for r in (1, 4, 16, 64, 256):
        point("r", r, r, 2048, names)
    for tokens in (16, 64, 256, 1024, 4096):
        point("tokens", tokens, 8, tokens, names)
    for count in range(1, len(names) + 1):
        point("adapted kinds of layer", count, 8, 2048, names[:count])
    return points


def plot(points: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(points), figsize=(12, 3.6), sharey=True, layout="constrained")
    for axis, (name, found) in zip(axes, points.items(), strict=True):
        at, own, theirs = zip(*found, strict=True)
        axis.plot(at, own, marker="o", label="lora_lightning")
        axis.plot(at, theirs, marker="s", label="PEFT")
        axis.axhline(1.0, color="grey", linewidth=1)
        if name == "adapted kinds of layer":
            axis.set_xticks(at)
        else:
            axis.set_xscale("log", base=2)
        axis.set_xlabel(name)
    axes[0].set_ylabel("step time over the frozen step")
    axes[0].legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape of batch and fewer rounds: minutes")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds of each figure")
    parser.add_argument("--curves", action="store_true", help="also against r, tokens and adapted layers, with a plot")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.rounds = min(options.rounds, 5) if options.quick else options.rounds
    clock = CLOCKS[options.clock]
    found: dict[str, Any] = {"machine": machine(), "options": vars(options)}
    print(*(f"{key}: {value}" for key, value in found["machine"].items()), sep=", ")
    found["step over the frozen step"] = step_table(options)
    found["injection of 224 linears"] = injection(options.rounds, clock)
    found["inference"] = merged_inference(options.rounds, clock)
    found["224 linears, saved and loaded"] = save_and_load(options.rounds, clock)
    for title in ("injection of 224 linears", "inference", "224 linears, saved and loaded"):
        print(f"{title}: " + ", ".join(f"{key} {value:.3g}" for key, value in found[title].items()))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "step.json").write_text(json.dumps(found, indent=2) + "\n")
    if options.curves:
        points = curves(options)
        (RESULTS / "curves.json").write_text(json.dumps(points, indent=2) + "\n")
        plot(points, RESULTS / "curves.svg")


if __name__ == "__main__":
    main()
