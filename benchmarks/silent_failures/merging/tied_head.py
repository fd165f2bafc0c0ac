"""Head and embedding are one matrix, the head alone is adapted, and the merge writes into both.

huggingface/peft#2777: with an adapted head or embedding of a tied model PEFT trains the two apart and leaves
`tie_word_embeddings` as it was; merged, the model gives "nonsensical generations". PEFT warns when it wraps the layer.
The merged model is written, read again, and compared with the trained one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.silent_failures.harness import Measured
from benchmarks.silent_failures.tiny import (
    Plain,
    apart,
    fit_lightning,
    fit_ours,
    fit_trainer,
    llama,
    our_config,
    peft_config,
    texts,
)
from lora_lightning import merge

TITLE = "the merge of a head that is tied to the embedding changes both"
THREAD = "huggingface/peft#2777"
WARNS = r"\btied?\b|tie_word|weight_tying"
X = torch.arange(8)[None]
HEAD = {"target_modules": ["lm_head"]}


def measured(trained: torch.Tensor, merged: Any, folder: Path) -> Measured:
    merged.save_pretrained(folder / "merged")
    read = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    off = apart(read(input_ids=X).logits, trained)
    return Measured(off < 1e-4, f"outputs are {off:.0%} off")


def ours(folder: Path) -> Measured:
    model = fit_ours(llama(tie_word_embeddings=True), texts(), our_config(**HEAD), steps=10).backbone
    trained = model.eval()(input_ids=X).logits
    merge(model)
    return measured(trained, model, folder)


def wrapped() -> Any:
    from peft import get_peft_model

    return get_peft_model(llama(tie_word_embeddings=True), peft_config(**HEAD))


def peft(folder: Path) -> Measured:
    model = wrapped()
    fit_trainer(model, texts(), folder, steps=10)
    return measured(model.eval()(input_ids=X).logits, model.merge_and_unload(), folder)


def lightning(folder: Path) -> Measured:
    model = wrapped()
    fit_lightning(Plain(model), texts(), steps=10)
    return measured(model.eval()(input_ids=X).logits, model.merge_and_unload(), folder)
