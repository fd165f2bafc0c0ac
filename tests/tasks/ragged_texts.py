"""Validation of a tagger and two writers by one or two processes: `python -m tests.tasks.ragged_texts FOLDER N`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning
import torch

from lora_lightning import LoRAConfig, LoRAModule, huggingface
from lora_lightning.data.chat.prompt_completion import PromptCompletionData
from lora_lightning.data.io.splits import SplitConfig
from lora_lightning.data.seq2seq import SequenceToSequenceData
from lora_lightning.data.token_classification import TokenClassificationData
from lora_lightning.tasks.generation import SequenceToSequence, TextGeneration
from lora_lightning.tasks.token_classification import TokenClassification
from tests.tiny_text import make_model, make_tagger, restaurants, sentences, write_rows

ROWS = 13
METRICS = ("bleu", "chrf", "ter", "rouge1", "rougeL", "exact_match")


def make(folder: Path) -> None:
    """Models and rows on disk, once for both."""
    make_tagger(folder / "tagger")
    make_model("t5", folder / "t5")
    make_model("gpt2", folder / "gpt2")
    write_rows(folder / "sentences.jsonl", sentences(ROWS))
    write_rows(folder / "restaurants.jsonl", restaurants(ROWS))


def parts(folder: Path) -> dict[str, tuple[Any, Any]]:
    """By kind, module and data."""
    options: dict[str, Any] = {"batch_size": 2, "split": SplitConfig(validation=0, test=0)}
    files = {name: {split: str(folder / f"{name}.jsonl") for split in ("train", "validation")} for name in ROW_FILES}
    tags = TokenClassificationData(files["sentences"], str(folder / "tagger"), **options)
    pairs = SequenceToSequenceData(files["restaurants"], str(folder / "t5"), "context", "completion", **options)
    prompts = PromptCompletionData(files["restaurants"], str(folder / "gpt2"), "{context} </s>", **options)
    written = {"generation": {"max_new_tokens": 6, "num_beams": 2}, "metrics": METRICS}
    return {
        "tagger": (_module(folder / "tagger", "TokenClassification", TokenClassification(tags.label_names), 5), tags),
        "t5": (_module(folder / "t5", "Seq2SeqLM", SequenceToSequence(pairs.tokenizer, **written)), pairs),
        "gpt2": (_module(folder / "gpt2", "CausalLM", TextGeneration(prompts.tokenizer, **written)), prompts),
    }


ROW_FILES = ("sentences", "restaurants")


def _module(folder: Path, auto: str, task: Any, labels: int | None = None) -> LoRAModule:
    torch.manual_seed(0)
    module = LoRAModule(
        huggingface(str(folder), auto_class=f"AutoModelFor{auto}", num_labels=labels), task, LoRAConfig(r=2)
    )
    for name, parameter in module.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    return module


def figures(folder: Path, devices: int) -> dict[str, dict[str, float]]:
    """What validation finds, in float64."""
    found = {}
    for kind, (module, data) in parts(folder).items():
        strategy = "ddp_fork" if devices > 1 else "auto"
        trainer = lightning.Trainer(
            accelerator="cpu", devices=devices, strategy=strategy, precision="64-true", logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.validate(module, data, verbose=False)
        found[kind] = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "figures.json").write_text(json.dumps(figures(folder, int(sys.argv[2]))))
