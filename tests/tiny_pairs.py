"""What comes in pairs, tiny: a Llama with a chat template and answers to prefer, texts that belong together."""

import random
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tiny import words_tokenizer

COLOURS = ["red", "green", "blue", "white", "black", "brown"]
WORDS = ["what", "colour", "is", "the", "sky", "grass", "it", "no", "idea", "user", "assistant", "system", *COLOURS]
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ' ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def make_tokenizer(directory: Path, *, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Of whole words; a text begins with nothing and ends with nothing but what it says."""
    vocabulary = [*SPECIAL.values(), *WORDS]
    tokenizer = words_tokenizer(vocabulary, split=Split(" ", "removed"), chat_template=template, **SPECIAL)
    tokenizer.save_pretrained(directory)
    return tokenizer


def make_llama(directory: Path) -> Path:
    """With random weights, two layers and its tokenizer, as `from_pretrained` expects them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    make_tokenizer(directory)
    return directory


def preferences(rows: int = 64, seed: int = 0) -> list[dict[str, str]]:
    """The right answer repeats the prompt's last word; the wrong one has no idea."""
    rng = random.Random(seed)
    return [
        {"prompt": f"what is {word}", "chosen": f"it is {word}", "rejected": " ".join(["no"] * rng.randint(1, 4))}
        for word in rng.choices(COLOURS, k=rows)
    ]


def as_messages(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """The same row with a prompt of messages and answers of messages."""
    return {
        column: [{"role": "user" if column == "prompt" else "assistant", "content": text}]
        for column, text in row.items()
    }
