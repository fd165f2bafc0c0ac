"""What a look of `RankTelemetry` costs.

    python -m benchmarks.rank_telemetry [--repeats 7]

Milliseconds of processor time, on one thread, for 224 adapted linear layers: W0's norms, taken once a fit; a look; a
look with the amplification factor. Beside them a forward and backward of 2,048 tokens through the same layers. A figure
is the median; 16 layers are measured and scaled to 224. Written to benchmarks/results/rank_telemetry.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch import nn

from benchmarks.measure import RESULTS
from lora_lightning import LoRAConfig, inject
from lora_lightning.analysis.measures import base_norm, measures_of, whole_base
from lora_lightning.analysis.spectra import update_pairs
from lora_lightning.lora.inject import adapted_layers

LAYERS, MEASURED, TOKENS = 224, 16, 2048


def milliseconds(call, repeats: int) -> float:
    """Of processor time, for all layers."""
    call()
    spent = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        spent.append(time.process_time() - start)
    return statistics.median(spent) * 1000 * LAYERS / MEASURED


def measured(width: int, r: int, repeats: int) -> dict[str, float]:
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(MEASURED)))
    inject(model, LoRAConfig(r=r))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    layers = [layer for _, layer in adapted_layers(model)]
    norms = [base_norm(whole_base(layer)) for layer in layers]

    def look(amplification: bool) -> None:
        for layer, norm in zip(layers, norms, strict=True):
            measures_of(update_pairs(layer), 1.0, norm, whole_base(layer) if amplification else [])

    x = torch.randn(TOKENS, width)
    return {
        "w0_norms": milliseconds(lambda: [base_norm(whole_base(layer)) for layer in layers], repeats),
        "look": milliseconds(lambda: look(False), repeats),
        "look_with_amplification": milliseconds(lambda: look(True), repeats),
        "forward_and_backward": milliseconds(lambda: model(x).sum().backward(), max(1, repeats // 3)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {f"width {d}, r={r}": measured(d, r, repeats) for d, r in ((384, 8), (768, 8), (2048, 8), (2048, 64))}
    for name, figures in found.items():
        print(f"{name}: " + ", ".join(f"{what.replace('_', ' ')} {value:,.0f} ms" for what, value in figures.items()))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "rank_telemetry.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
