"""Cost of what an export proves: W0's fingerprint beside plain SHA-256, and an export's peak memory.

    python -m benchmarks.export [--repeats 5] [--gib 1.0] [--export-mb 500]

The fingerprint is taken of a bfloat16 model of which half is one embedding; SHA-256 goes over the same bytes on one
core. The two take turns, and a figure is the median; core seconds count the work alone, whatever else the machine
does. The export runs in a process of its own, whose peak of resident
memory is set beside the size of the model that it exports. Written to benchmarks/results/export.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from torch import nn

from lora_lightning.lora.frozen.fingerprint import fingerprint

RESULTS = Path(__file__).parent / "results"
WIDTH = 2048


def model_of(size: float) -> nn.Module:
    """`size` bytes in bfloat16: half an embedding, half square layers."""
    rows = int(size / 2 / 2 / WIDTH)
    layers = (nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(rows // WIDTH))
    return nn.Sequential(nn.Embedding(rows, WIDTH, dtype=torch.bfloat16), *layers).requires_grad_(False)


def plain_sha256(model: nn.Module) -> None:
    for tensor in model.state_dict().values():
        hashlib.sha256(tensor.view(torch.uint8).numpy().data).hexdigest()


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_fingerprint(gib: float, repeats: int) -> dict[str, float]:
    model = model_of(gib * 2**30)
    own, plain, work = [], [], []
    for _ in range(repeats):
        started = time.process_time()
        own.append(timed(lambda: fingerprint(model)))
        work.append(time.process_time() - started)
        plain.append(timed(lambda: plain_sha256(model)))
    return {
        "fingerprint, s per GiB": statistics.median(own) / gib,
        "fingerprint, core s per GiB": statistics.median(work) / gib,
        "one core's SHA-256, s per GiB": statistics.median(plain) / gib,
        "fingerprint over one core's SHA-256": statistics.median(a / b for a, b in zip(own, plain, strict=True)),
    }


EXPORT = """
import sys, threading, torch, transformers
from lora_lightning import LoRAConfig, LoRAModule, SequenceClassification
from lora_lightning.export.export import export

def resident():  # of this process's own pages: mapped files are the page cache's
    return 1024 * sum(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(("RssAnon", "RssShmem")))

layers = int(float(sys.argv[2]) * 1e6 / (4 * 12 * 1024**2))
config = transformers.BertConfig(hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16,
                                 intermediate_size=4096, vocab_size=1000, num_labels=2)
module = LoRAModule(transformers.BertForSequenceClassification(config), SequenceClassification(2),
                    LoRAConfig(r=8, modules_to_save=["classifier"]))
size = sum(p.numel() * p.element_size() for p in module.backbone.parameters())
before, peak, done = resident(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, resident())

watcher = threading.Thread(target=watch)
watcher.start()
batch = {"input_ids": torch.ones(1, 8, dtype=torch.long)}
export(module.backbone, module.task, module.w0_fingerprint(), sys.argv[1], batch=batch)
done.set()
watcher.join()
print(size, before, peak)
"""


def measure_export(megabytes: float) -> dict[str, float]:
    """Peak memory that the process held of its own, over the model's size, the model itself included."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", EXPORT, str(Path(folder) / "out"), str(megabytes)]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    size, before, peak = map(int, shown.split()[-3:])
    return {"exported model, MB": size / 1e6, "peak above the start, in models": (peak - before) / size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="rounds of fingerprint and SHA-256")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the model that is hashed")
    parser.add_argument("--export-mb", type=float, default=500, help="size of the model that is exported")
    options = parser.parse_args()
    found = measure_fingerprint(options.gib, options.repeats) | measure_export(options.export_mb)
    for name, value in found.items():
        print(f"{name:38}{value:12.3f}")
    where = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "export.json").write_text(json.dumps(where | vars(options) | found, indent=2) + "\n")


if __name__ == "__main__":
    main()
