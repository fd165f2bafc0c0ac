"""Tiny T5, BART and GPT-2 in the hub's own layout, over a set of attributes and the sentences that say them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers.processors import TemplateProcessing

from tests.tiny import words_tokenizer

NAMES = ["Alimentum", "Zizzi", "Cotto", "Strada"]
FOODS = ["French", "Italian", "Indian", "English"]
AREAS = ["riverside", "centre"]
PLAIN = ["name", "food", "area", "|", ":", "is", "a", "place", "in", "the", "serves", "and", "."]
VOCABULARY = ["<pad>", "</s>", "<unk>", *NAMES, *FOODS, *AREAS, *PLAIN]


def restaurants(rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Attributes, and one of two sentences that say them: as in E2E, the same attributes come more than once."""
    rng = random.Random(seed)
    made = []
    for _ in range(rows):
        name, food, area = rng.choice(NAMES), rng.choice(FOODS), rng.choice(AREAS)
        said = [f"{name} serves {food} food in the {area} .", f"in the {area} {name} is a {food} place ."]
        made.append({"context": f"name : {name} | food : {food} | area : {area}", "completion": rng.choice(said)})
    return made


def make_tokenizer(folder: Path, *, ends: bool) -> tf.PreTrainedTokenizerFast:
    """Of whole words; with `ends`, a text closes with the end token."""
    closes = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)]) if ends else None
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "padding_side": "right"}
    inputs = ["input_ids", "attention_mask"]
    tokenizer = words_tokenizer(VOCABULARY, ends=closes, model_input_names=inputs, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(kind: str, folder: Path | None = None, *, width: int = 32) -> tf.PreTrainedModel:
    """`t5`, `bart` or `gpt2` with random weights, in `folder` with its tokenizer where one is given."""
    torch.manual_seed(0)
    shared: dict[str, Any] = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "eos_token_id": 1}
    model: tf.PreTrainedModel
    if kind == "t5":
        config = {"d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        model = tf.T5ForConditionalGeneration(tf.T5Config(**shared, **config, decoder_start_token_id=0))
    elif kind == "bart":
        sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 64))}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0}
        ends = {"bos_token_id": 1, "decoder_start_token_id": 1, "forced_eos_token_id": None}
        model = tf.BartForConditionalGeneration(
            tf.BartConfig(d_model=width, max_position_embeddings=64, **shared, **sizes, **heads, **ends)
        )
    else:
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1}
        model = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=width, n_layer=2, n_head=4, n_positions=64, **shared, **off))
    if folder is not None:
        model.save_pretrained(folder)
        make_tokenizer(folder, ends=kind != "gpt2")
    return model


def sentences(rows: int, seed: int = 0) -> list[dict[str, list[str]]]:
    """Words and IOB2 tags of names, foods and areas; a name may have two words."""
    rng = random.Random(seed)
    made = []
    for _ in range(rows):
        name, food, area = rng.sample(NAMES, rng.randint(1, 2)), rng.choice(FOODS), rng.choice(AREAS)
        words = [*name, "serves", food, "in", "the", area, "."]
        tags = [*["B-NAME", "I-NAME"][: len(name)], "O", "B-FOOD", "O", "O", "B-AREA", "O"]
        made.append({"tokens": words, "ner_tags": tags})
    return made


def make_tagger(folder: Path) -> Path:
    """A headless BERT with random weights and a tokenizer of whole words."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    tf.BertModel(tf.BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    make_tokenizer(folder, ends=True)
    return folder
