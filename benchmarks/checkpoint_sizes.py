"""What a run writes, beside W0 and beside what full fine-tuning would write.

    python -m benchmarks.checkpoint_sizes

RoBERTa-base from random weights: each file is written by a fit of one step and weighed, beside what the formulas say.
The 7B shape of Llama on the meta device: the formulas alone, without a weight. Bytes, from the tensors' shapes:

    adapter file       4 |Theta|
    checkpoint         12 |Theta| + 4 tensors       A and B, AdamW's two moments of each, and its count of steps
    W0                 its own numbers in its own dtype
    full fine-tuning   12 |W0| + 4 tensors          float32 weights and the two moments, as bf16-mixed trains them

Headers come on top: names and shapes, the settings and the fingerprint of W0, random states. Written to
benchmarks/results/checkpoint_sizes.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.measure import RESULTS
from lora_lightning import (
    Checkpoints,
    FreezeBase,
    LoRAConfig,
    LoRAModule,
    LoRATrainer,
    Resume,
    SequenceClassification,
    inject,
    save_adapter,
)
from lora_lightning.lora.formats.atomic_dir import human_size
from lora_lightning.lora.frozen.tensors import adapter_tensors, base_tensors


def computed(model: nn.Module) -> dict[str, int]:
    """Bytes of each file's tensors, for an adapted model on any device."""
    trained = list({id(t): t for t in adapter_tensors(model).values()}.values())
    base = list({id(t): t for t in base_tensors(model).values()}.values())
    states = 3  # the weight itself and AdamW's two moments, in float32
    return {
        "adapter": sum(t.numel() * t.element_size() for t in trained),
        "checkpoint": sum(states * t.numel() * t.element_size() + 4 for t in trained),
        "w0": sum(t.numel() * t.element_size() for t in base),
        "full_checkpoint": sum(states * 4 * t.numel() + 4 for t in base if t.is_floating_point()),
    }


def written(model: nn.Module, config: LoRAConfig, rows: list[dict[str, Any]], folder: Path) -> dict[str, int]:
    """Bytes of the files themselves, after a step of a fit; the full checkpoint is not written."""
    module = LoRAModule(model, SequenceClassification(2), config)
    checkpoints = Checkpoints(dirpath=str(folder), monitor=None)
    trainer = LoRATrainer(
        precision="float32",
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FreezeBase(show_table=False), checkpoints, Resume()],
    )
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=len(rows)))  # type: ignore[arg-type]
    save_adapter(module.backbone, folder / "adapter")
    tensors = {key: t.detach().clone() for key, t in base_tensors(module.backbone).items()}
    save_file(tensors, folder / "w0.safetensors")
    return {
        "adapter": (folder / "adapter" / "adapter_model.safetensors").stat().st_size,
        "checkpoint": (folder / "last.ckpt").stat().st_size,
        "w0": (folder / "w0.safetensors").stat().st_size,
    }


def roberta() -> nn.Module:
    """RoBERTa-base's shape, which is what transformers' config says by itself but for the vocabulary."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
    return RobertaForSequenceClassification(config)


def llama_7b() -> nn.Module:
    """Llama 2 7B's shape in bfloat16, without memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


QUERY_VALUE = {"roberta-base": ["query", "value"], "llama-7b": ["q_proj", "v_proj"]}
MODELS: dict[str, Callable[[], nn.Module]] = {"roberta-base": roberta, "llama-7b": llama_7b}


def case(name: str, targets: str | list[str]) -> dict[str, Any]:
    model, config = MODELS[name](), LoRAConfig(r=8, target_modules=targets)
    found: dict[str, Any] = {"model": name, "targets": targets}
    if name == "roberta-base":
        rows = [{"input_ids": torch.arange(5, 21), "labels": torch.tensor(i)} for i in (0, 1)]
        with tempfile.TemporaryDirectory() as folder:
            found["written"] = written(model, config, rows, Path(folder))
    else:
        inject(model, config, run_init=False)
    trained = sum(t.numel() for t in adapter_tensors(model).values())
    return found | {"trainable": trained, "computed": computed(model)}


def table(cases: list[dict[str, Any]]) -> str:
    head = f"{'r=8':<32}{'trains':>12}{'adapter':>12}{'checkpoint':>12}{'W0':>12}{'full':>12}{'full : ours':>13}"
    lines = [head]
    for found in cases:
        targets = found["targets"] if isinstance(found["targets"], str) else ", ".join(found["targets"])
        for kind in ("written", "computed"):
            sizes = found.get(kind)
            if sizes is None:
                continue
            name = f"{found['model']}, {targets}" if kind == "written" or "written" not in found else "  computed"
            full = found["computed"]["full_checkpoint"]
            cells = [sizes["adapter"], sizes["checkpoint"], sizes["w0"], sizes.get("full_checkpoint", full)]
            told = "".join(f"{human_size(size):>12}" for size in cells)
            lines.append(f"{name:<32}{found['trainable']:>12,}{told}{full / sizes['checkpoint']:>13,.0f}")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    cases = [case(name, targets) for name in MODELS for targets in (QUERY_VALUE[name], "all-linear")]
    print(table(cases))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "checkpoint_sizes.json").write_text(json.dumps(cases, indent=2) + "\n")


if __name__ == "__main__":
    main()
