"""What `plan` says of a fit's memory, beside what the fit then takes.

    python -m benchmarks.plan [--models minilm smollm2 dinov2 efficientnet] [--steps 4] [--precision 32-true]

Each fit runs in a process of its own, as the command runs it, without validation and without the probe. Measured are
the peak of the resident set (Linux's VmHWM) of the whole process, from the first step on, and the largest batch that
was seen; the plan is made for a batch of that size. `growth` is the peak over what was resident before the first step,
which for a model read through a memory map is not yet all of W0. Written to benchmarks/results/plan.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, machine

ROOT = Path(__file__).parents[1]
MODELS = {
    "minilm": ["-c", "configs/demo.yaml"],
    "smollm2": ["-c", "configs/demo-lm.yaml", "--data.init_args.batch_size", "2"],
    "dinov2": ["-c", "configs/demo-vision-dinov2.yaml"],
    "efficientnet": ["-c", "configs/demo-vision.yaml"],
}
LABELS = {"dinov2": 10, "efficientnet": 10, "minilm": 2}
"""Which the data would tell."""


def status(name: str) -> int:
    """Bytes that the kernel counts for this process."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def fit(arguments: list[str]) -> None:
    """In a child: the command, with a callback that measures."""
    from lightning.pytorch import Callback

    from lora_lightning.cli.build import build_run

    found: dict[str, Any] = {"shape": [0], "peaks": []}

    class Measure(Callback):
        def on_train_start(self, *_: Any) -> None:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            found["before"] = status("VmRSS")
            found["while loading"] = status("VmHWM")
            Path("/proc/self/clear_refs").write_text("5")

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
            shape = batch["input_ids" if "input_ids" in batch else "pixel_values"].shape
            found["shape"] = max(found["shape"], list(shape), key=lambda s: [s[0] * s[-1], *s])

        def on_train_batch_end(self, *_: Any) -> None:
            found["peaks"].append(status("VmHWM"))

    with tempfile.TemporaryDirectory() as folder:
        run = build_run(["fit", *arguments, "--runs_dir", folder])
        assert run.trainer is not None
        run.trainer.callbacks.append(Measure())
        run.trainer.fit(run.module, datamodule=run.data)
    print("measured", json.dumps({**found, "peak": found["peaks"][-1]}))


def child(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *command], stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True
    )
    return done.stdout


def one(name: str, precision: str, steps: int) -> dict[str, Any]:
    config = [*MODELS[name], "--trainer.precision", precision]
    quiet = [
        "--trainer.limit_val_batches",
        "0",
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.callbacks",
        "null",
    ]
    out = child("benchmarks.plan", "--fit", *config, *quiet, "--trainer.max_steps", str(steps))
    measured = json.loads(out.rpartition("measured ")[2].splitlines()[0])
    rows, length = measured["shape"][0], measured["shape"][-1]
    sized = ["--batch_size", str(rows)] + (["--length", str(length)] if len(measured["shape"]) == 2 else [])
    labels = ["--num_labels", str(LABELS[name])] if name in LABELS else []
    plan = json.loads(child("lora_lightning", "plan", *config, *sized, *labels, "--precisions", "[]", "--json"))
    own = next(row for row in plan["memory"] if not row["activation_checkpointing"])
    return {
        "measured": measured,
        "tensors": own["peak"],
        "planned": plan["process"]["peak"],
        "base": plan["process"]["base"],
        "error": plan["process"]["peak"] / measured["peak"] - 1,
        "trainable": plan["trainable"],
    }


def main() -> None:
    if sys.argv[1:2] == ["--fit"]:
        fit(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--precision", default="32-true")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name in options.models:
        found[name] = one(name, options.precision, options.steps)
        row, mb = found[name], 1e6
        print(
            f"{name:<13} batch {row['measured']['shape']}: planned {row['planned'] / mb:,.0f} MB (tensors"
            f" {row['tensors'] / mb:,.0f}), measured {row['measured']['peak'] / mb:,.0f} MB, {row['error']:+.1%}",
            flush=True,
        )
        RESULTS.mkdir(exist_ok=True)
        written = {"machine": machine(), "precision": options.precision, "fits": found}
        (RESULTS / f"plan-{options.precision}.json").write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
