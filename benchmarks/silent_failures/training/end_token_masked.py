"""The pad token is the end token, so that masking the padding masks every end: the model never learns to stop.

huggingface/transformers#23530: with `pad_token` set to `eos_token`, as the documentation shows it, the collator
overwrites all end tokens in the labels with -100, not just the padding. huggingface/trl#976 reports models that never
stop.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.silent_failures.harness import Measured

TITLE = "padding with the end token masks all end tokens"
THREAD = "huggingface/transformers#23530"
WARNS = "pad|eos|end token"
TEXTS = ["a b c", "a b c d e f"]


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({word: i for i, word in enumerate(["<end>", "<unk>", *"abcdef"])}, unk_token="<unk>")
    made = Tokenizer(words)
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>", unk_token="<unk>")


def measured(labels: Tensor) -> Measured:
    """Of two rows, each with one end."""
    count = int((labels == tokenizer().eos_token_id).sum())
    return Measured(count == len(TEXTS), f"{count} of {len(TEXTS)} end tokens are trained on")


def ours(folder: Path) -> Measured:
    from lora_lightning import PromptCompletionData, SplitConfig

    tokenizer().save_pretrained(folder / "tokenizer")
    lines = [json.dumps({"prompt": text[:1], "completion": text[1:]}) for text in TEXTS]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    split = SplitConfig(validation=0, test=0)
    data = PromptCompletionData(str(folder / "rows.jsonl"), str(folder / "tokenizer"), split=split, batch_size=2)
    data.setup("fit")
    return measured(next(iter(data.train_dataloader()))["labels"])


def peft(folder: Path) -> Measured:
    """The Trainer's own collator; it has no part in who wraps the model."""
    from transformers import DataCollatorForLanguageModeling

    own = tokenizer()
    collate = DataCollatorForLanguageModeling(own, mlm=False)
    return measured(collate([own(f"{text} {own.eos_token}") for text in TEXTS])["labels"])


lightning = peft
