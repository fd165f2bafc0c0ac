"""What the drift of an adapter costs beside a validation pass.

    python -m benchmarks.drift RUN [RUN ...] [--texts 200] [--rounds 3]

Seconds of processor time for 200 texts, of a language model the package's neutral text over and over, of others the
run's own validation inputs; and for one pass over the run's validation set with its metrics and their errors. A figure
is the median over rounds. Written to benchmarks/results/drift.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import cycle, islice
from pathlib import Path

from benchmarks.measure import RESULTS, machine
from lora_lightning.analysis.drift import measure_drift
from lora_lightning.analysis.drift_inputs import CAUSAL, neutral_texts, run_batches, text_batches
from lora_lightning.analysis.strength import validation_metrics
from lora_lightning.cli.build import open_run
from lora_lightning.commands.drift import validation_batches
from lora_lightning.training.checkpoints.run_folder import find_checkpoint


def seconds(call, rounds: int) -> float:
    """Of processor time, the median."""
    spent = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        spent.append(time.process_time() - start)
    return statistics.median(spent)


def measured(folder: Path, count: int, rounds: int) -> dict[str, float]:
    run = open_run(find_checkpoint(folder))
    backbone, task, data = run.module.backbone, run.module.task, run.data
    forward = run.trainer.precision_plugin.forward_context
    validation = list(validation_batches(run))
    if task.peft_task_type == CAUSAL:
        texts = list(islice(cycle(neutral_texts()), count))
        batches = text_batches(texts, data.tokenizer, task, backbone, 512)
    else:
        batches, texts = run_batches([batch for _, batch in validation], task, backbone, data.tokenizer, count)
    drift = seconds(lambda: measure_drift(backbone, batches, texts, forward=forward), rounds)
    found = {
        "texts": len(texts),
        "drift_seconds": drift,
        "validation_rows": sum(task.examples(batch) for _, batch in validation),
    }
    spent = seconds(lambda: validation_metrics(backbone, task, validation, forward=forward), rounds)
    return {**found, "validation_seconds": spent, "ratio": drift / spent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found = {folder.name: measured(folder, args.texts, args.rounds) for folder in args.runs}
    for name, own in found.items():
        print(
            f"{name}: drift on {own['texts']} texts {own['drift_seconds']:.1f} s, a validation pass of"
            f" {own['validation_rows']} rows {own['validation_seconds']:.1f} s: ratio {own['ratio']:.2f}"
        )
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "drift.json").write_text(json.dumps({"machine": machine(), **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
