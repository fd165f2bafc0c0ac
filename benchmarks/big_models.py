"""What the flags for big models cost and give here: bytes kept for backward, time of a step, memory to load.

    python -m benchmarks.big_models [--rounds 5]

A BERT of the given width with LoRA r=8 on all linear layers; steps interleaved, medians of paired ratios.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers import BertConfig, BertModel

from benchmarks.measure import kept_bytes, machine, paired, ratios
from lora_lightning import LoRAConfig, inject
from lora_lightning.training.activations import Compilation, Offload, Recomputation

CHILD = """
import sys, torch
from pathlib import Path
from lora_lightning import huggingface
from lora_lightning.lora.meta.empty_model import fill_from_files
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
def now():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
import transformers.models.bert.modeling_bert
before = now()
model = huggingface(sys.argv[1], "AutoModel", dtype=sys.argv[3], on_meta=sys.argv[2] == "meta")
fill_from_files(model)
print(peak() - before, sum(p.nbytes for p in model.parameters()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.manual_seed(0)
    heads, inner = given.width // 64, 4 * given.width
    config = BertConfig(
        hidden_size=given.width,
        num_hidden_layers=given.layers,
        num_attention_heads=heads,
        intermediate_size=inner,
    )
    model = BertModel(config).eval()
    inject(model, LoRAConfig(r=8))
    ids = torch.randint(1, config.vocab_size, (8, 64))
    print(json.dumps(machine()))
    print(json.dumps(steps(model, ids, given.rounds), indent=2))
    print(json.dumps(loading(config), indent=2))


def steps(model: nn.Module, ids: torch.Tensor, rounds: int) -> dict[str, object]:
    """By flag, MB kept for backward and the time of forward and backward over those without it."""
    contexts: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "none": nullcontext,
        "activation_checkpointing": Recomputation(model).on,
        "offload_activations, copied within the CPU": Offload(model, stays_on=()).on,
        "compile": Compilation(model, {}).on,
    }

    def forward(context: Callable[[], AbstractContextManager[None]]) -> torch.Tensor:
        with context():
            return model(ids).last_hidden_state.square().mean()  # type: ignore[no-any-return]

    calls = {name: lambda c=context: forward(c).backward() for name, context in contexts.items()}
    seconds = ratios(paired(calls, rounds, time.perf_counter), to="none")
    kept = {name: kept_bytes(model, lambda c=context: forward(c)) / 1e6 for name, context in contexts.items()}
    return {name: {"MB kept": round(kept[name], 1), "time": [round(x, 2) for x in seconds[name]]} for name in contexts}


def loading(config: BertConfig) -> dict[str, object]:
    """Peak of memory above the start, over the bytes of the loaded model, from files of float32."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config).save_pretrained(folder)
        for dtype in ("float32", "bfloat16"):
            for how in ("ordinary", "meta"):
                args = [sys.executable, "-c", CHILD, folder, how, dtype]
                done = subprocess.run(args, capture_output=True, text=True, check=True, timeout=300)
                peak, size = map(int, done.stdout.split()[-2:])
                found[f"{dtype}, {how}"] = {"MB": round(size / 1e6), "peak over it": round(peak / size, 2)}
    return found


if __name__ == "__main__":
    main()
