"""Tiny causal language models and a tokenizer of words, made on disk or in memory in a moment."""

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.tiny import words_tokenizer

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS = [*NUMBERS, "and", "then", "comes", "a", "the", "dog", "cat", "ran", "sat", "home"]
VOCABULARY = ["<unk>", "<end>", "<pad>", *WORDS]
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.5,  # so that what attention does shows in the logits
}
LEFT_OUT = object()
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 24},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "bloom": {"n_layer": 2, "n_head": 2},
    "mamba": {"state_size": 4},
    "falcon": {"head_dim": LEFT_OUT},
}


def make_model(kind: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> Any:
    """A causal language model of a family, with random weights and without dropout, in evaluation mode."""
    sizes = {k: v for k, v in {**SIZES, **OWN.get(kind, {}), **config}.items() if v is not LEFT_OUT}
    attention = {k: sizes.pop(k) for k in ("attn_implementation",) if k in sizes}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), **attention).to(dtype).eval()
    if dtype == torch.float64:
        _norms_in_double(model)
    return model


def _norms_in_double(model: Any) -> None:
    """transformers' RMS norms go through float32 whatever their input is: they would round two equal ways apart."""
    for norm in (m for m in model.modules() if type(m).__name__.endswith("RMSNorm")):
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        offset = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0
        norm.forward = lambda x, w=norm.weight, eps=eps, o=offset: F.rms_norm(x, x.shape[-1:], w + o, eps)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of `WORDS`."""
    return words_tokenizer(VOCABULARY, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")


def make_lm(directory: Path, kind: str = "llama", *, seed: int = 0, **config: Any) -> Path:
    """The two on disk, as `from_pretrained` expects them."""
    make_model(kind, seed=seed, **config).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def make_texts(count: int, *, seed: int = 0, longest: int = 12) -> list[str]:
    """Texts that count on from some number, as can be learnt, of 1 to `longest` words."""
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(10, (count,), generator=draw).tolist()
    lengths = torch.randint(1, longest + 1, (count,), generator=draw).tolist()
    return [" ".join(NUMBERS[(s + i) % 10] for i in range(n)) for s, n in zip(starts, lengths, strict=True)]
