"""Memory of a fit over a bfloat16 base of about 1B parameters, beside PEFT in the Hugging Face Trainer.

    python -m benchmarks.memory [--quick] [--rows 1] [--tokens 512] [--steps 3] [--threads 1]

Llama's shape from random weights, held in bfloat16; A and B in float32 on all linear layers, r=8; AdamW; bfloat16
autocast. Every way starts at the same A, sees the same tokens in the same order with the same learning rate, and tells
its losses, so that it is the same work. Each runs in a process of its own. The peak is the kernel's count of the
resident set (Linux), set back when the model is there and the fit begins; `kept` is what one forward holds for
backward, counted at the allocator. `needs` is what the arithmetic cannot do without: W0, A and B with their gradients
and AdamW's moments, and what is kept. Written to benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from torch import Tensor, nn

from benchmarks.measure import RESULTS, kept_bytes, machine

LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 14,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
QUICK = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
RATE, RANK = 1e-3, 8
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Fit(NamedTuple):
    """A fit that is ready to go."""

    run: Callable[[], object]
    model: nn.Module
    losses: list[float]
    """Filled while it runs."""
    forward: Callable[[], Tensor]
    """One forward, as a step of it has it."""


def llama(shape: dict[str, int]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**shape, max_position_embeddings=2048, use_cache=False)  # type: ignore[arg-type]
    model: nn.Module = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.train()  # no dropout in it; the Trainer would switch it on


def rows_of(options: argparse.Namespace) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    vocabulary = shape_of(options)["vocab_size"]
    shape = (options.rows * options.steps, options.tokens)
    ids = torch.randint(vocabulary, shape, generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def shape_of(options: argparse.Namespace) -> dict[str, int]:
    return QUICK if options.quick else LARGE


@torch.no_grad()
def same_start(model: nn.Module) -> None:
    """A drawn by the layer's name, whoever's layer it is."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            layer = re.sub(r"\.(lora_A.*|default.*)$", "", name.partition("layers.")[2])
            seed = int.from_bytes(hashlib.sha256(layer.encode()).digest()[:4], "big")
            parameter.normal_(0.0, 1.0 / RANK, generator=torch.Generator().manual_seed(seed))


def ours(options: argparse.Namespace, folder: str) -> Fit:
    from lightning.pytorch import Callback

    from lora_lightning import CausalLM, Checkpoints, FreezeBase, LoRAConfig, LoRAModule, LoRATrainer

    losses: list[float] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))

    rows = rows_of(options)
    optimizer = functools.partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0, foreach=True)
    config = LoRAConfig(r=RANK, alpha=RANK, target_modules=LAYERS)
    module = LoRAModule(llama(shape_of(options)), CausalLM(), config, optimizer, backbone_mode="train")
    same_start(module.backbone)
    trainer = LoRATrainer(
        precision="bf16-base",
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[FreezeBase(), Checkpoints(monitor=None), Keep()],
    )
    loader = torch.utils.data.DataLoader(rows, batch_size=options.rows)  # type: ignore[arg-type]
    batch = {key: torch.stack([row[key] for row in rows[: options.rows]]) for key in rows[0]}

    def forward() -> Tensor:
        with trainer.precision_plugin.forward_context():
            return module.task.step(module.backbone, batch).loss

    return Fit(lambda: trainer.fit(module, loader), module.backbone, losses, forward)


def peft_in_trainer(options: argparse.Namespace, folder: str) -> Fit:
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    losses: list[float] = []
    rows = rows_of(options)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS, task_type="CAUSAL_LM")
    model = get_peft_model(llama(shape_of(options)), config)  # type: ignore[arg-type]  # autocast_adapter_dtype: float32 A and B
    same_start(model)

    class InOrder(Trainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(rows, batch_size=options.rows)  # type: ignore[arg-type]

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=options.steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        bf16=True,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=options.rows,
        gradient_checkpointing=False,
    )
    trainer = InOrder(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
    batch = {key: torch.stack([row[key] for row in rows[: options.rows]]) for key in rows[0]}

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = model(**batch).loss
        return loss

    return Fit(trainer.train, model, losses, forward)


WAYS: dict[str, Callable[[argparse.Namespace, str], Fit]] = {
    "ours": ours,
    "PEFT in the Hugging Face Trainer": peft_in_trainer,
}


def status(name: str) -> float:
    """MB that the kernel counts for this process: `VmRSS` now, `VmHWM` at most."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def forget_peak() -> None:
    """Give back what is free, and let the peak count from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def one(way: str, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        fit = WAYS[way](options, folder)
        built = status("VmHWM")
        forget_peak()
        before, start = status("VmRSS"), time.perf_counter()
        fit.run()
        peak, seconds = status("VmHWM"), time.perf_counter() - start
    parameters = list(fit.model.parameters())
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    w0 = sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad)
    kept = kept_bytes(fit.model, fit.forward)
    return {
        "losses": fit.losses,
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "dtypes": sorted({f"{p.requires_grad}: {p.dtype}" for p in parameters}),
        "W0, MB": w0 / 1e6,
        "peak while built, MB": built,
        "at the start, MB": before,
        "peak, MB": peak,
        "above the start, MB": peak - before,
        "kept for backward, MB": kept / 1e6,
        "needs above the start, MB": (kept + 3 * trained) / 1e6,  # a gradient and two moments of each
        "seconds": seconds,
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    columns = ("at the start", "peak", "above the start", "kept for backward", "needs above the start")
    lines = ["MB".ljust(34) + "".join(name.rjust(23) for name in columns) + "  losses"]
    for way, row in found.items():
        told = " ".join(f"{loss:.4f}" for loss in row["losses"])
        lines.append(way.ljust(34) + "".join(f"{row[f'{name}, MB']:>23,.0f}" for name in columns) + f"  {told}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to try the benchmark out")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "memory.json")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        print(json.dumps(one(options.way, options)))
        return
    found: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--way", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
        print(f"{way}: {found[way]['seconds']:.0f} s", flush=True)
    print(table(found))
    options.output.parent.mkdir(exist_ok=True)
    given = {name: str(value) for name, value in vars(options).items()}
    written = {"machine": machine(), "shape": shape_of(options), "options": given, "fits": found}
    options.output.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
