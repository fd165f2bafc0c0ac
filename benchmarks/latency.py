"""Time of one forward pass of the merged model beside the plain backbone's, the unmerged one's and PEFT's merged one's.

    python -m benchmarks.latency [--repeats 25] [--models bert,llama,gpt2,resnet18] [--clock cpu]

The paper claims that a merged model costs nothing extra. One short input at a time, where an extra would show most.
Variants are interleaved in random order, each called until `--slice` seconds are over; a figure is the median over the
rounds of the paired ratio to the plain backbone, with the spread in which the middle half of the rounds lies. `plain
again` is a second copy of the plain backbone: what its ratio differs from 1 by is noise. `--clock cpu` counts this
process's own time, for a machine that others use too. Written to benchmarks/results/latency.json.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from torch import nn

from lora_lightning import LoRAConfig, inject, merge

RESULTS = Path(__file__).parent / "results"
Call = Callable[[nn.Module], Any]
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, 1000, (rows, length), generator=torch.Generator().manual_seed(0))


def bert() -> tuple[nn.Module, Call, list[str]]:
    """BERT-base's width and heads in two layers."""
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(num_hidden_layers=2, vocab_size=1000))
    x = ids(1, 32)
    return model, lambda m: m(x), ["query", "key", "value", "output.dense", "intermediate.dense"]


def llama() -> tuple[nn.Module, Call, list[str]]:
    """Llama's shape, grouped queries and gated MLP, in two layers of width 512."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=1000))
    x = ids(1, 32)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return model, lambda m: m(x, use_cache=False), names


def gpt2() -> tuple[nn.Module, Call, list[str]]:
    """GPT-2's width and heads in two layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, vocab_size=1000))
    x = ids(1, 32)
    return model, lambda m: m(x, use_cache=False), ["c_attn", "c_proj", "c_fc"]


def resnet18() -> tuple[nn.Module, Call, list[str]]:
    """timm's ResNet-18 on an image of 64 pixels; its 3 x 3 convolutions adapted."""
    import timm

    model = timm.create_model("resnet18", num_classes=10)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n.startswith("layer")]
    return model, lambda m: m(x), names


MODELS = {"bert": bert, "llama": llama, "gpt2": gpt2, "resnet18": resnet18}


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """B away from zero."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.01)
    return model.eval()


def variants(plain: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The same backbone in each form; all share nothing."""
    from peft import LoraConfig, get_peft_model

    adapted = copy.deepcopy(plain)
    inject(adapted, LoRAConfig(r=8, target_modules=names))
    trained(adapted)
    merged = copy.deepcopy(adapted)
    merge(merged)
    theirs = trained(get_peft_model(copy.deepcopy(plain), LoraConfig(r=8, lora_alpha=16, target_modules=names)))
    return {
        "plain": plain,
        "plain again": copy.deepcopy(plain),
        "merged": merged,
        "PEFT, merged and unloaded": copy.deepcopy(theirs).merge_and_unload(),
        "adapted": adapted,
        "PEFT, adapted": theirs,
    }


@torch.inference_mode()
def measure(
    models: dict[str, nn.Module], call: Call, repeats: int, slice_: float, now: Clock
) -> dict[str, list[float]]:
    """Seconds per call of each variant, round by round; two rounds of warm-up are left out."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(repeats + 2):
        for name in random.sample(list(models), len(models)):
            calls, start = 0, now()
            while (spent := now() - start) < slice_:
                call(models[name])
                calls += 1
            if round_ >= 2:
                seconds[name].append(spent / calls)
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    rows = {}
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if name != "plain" else (1.0, 1.0, 1.0)
        rows[name] = {"ms": 1000 * statistics.median(own), "over plain": middle, "from": low, "to": high}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25, help="interleaved rounds")
    parser.add_argument("--slice", type=float, default=0.1, help="seconds of calls per variant and round")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--models", default=",".join(MODELS), help="with commas between")
    options = parser.parse_args()
    random.seed(0)
    found: dict[str, Any] = {}
    print(f"{'':12}{'':28}{'ms':>8}{'over plain':>12}{'middle half':>16}")
    for name in options.models.split(","):
        torch.manual_seed(0)
        plain, call, names = MODELS[name]()
        plain.eval().requires_grad_(False)
        forms = variants(plain, names)
        found[name] = summary(measure(forms, call, options.repeats, options.slice, CLOCKS[options.clock]))
        for variant, row in found[name].items():
            half = f"{row['from']:.3f} to {row['to']:.3f}"
            print(f"{name:12}{variant:28}{row['ms']:8.2f}{row['over plain']:12.3f}{half:>16}", flush=True)
    where = {"machine": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "latency.json").write_text(json.dumps(where | vars(options) | {"models": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
