"""A tiny BERT in the hub's own layout and a set that it can learn, made on disk in a moment."""

import csv
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BertConfig, BertModel, BertTokenizer, PreTrainedTokenizerFast

GOOD = ["fine", "lovely", "bright", "warm", "clever"]
BAD = ["dull", "grim", "empty", "cold", "clumsy"]
PLAIN = ["the", "film", "is", "a", "story", "of", "two", "friends", "and", "its", "end"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *PLAIN]


def words_tokenizer(vocabulary, *, split=None, ends=None, **options) -> PreTrainedTokenizerFast:
    """Of whole words, numbered in their order; `ends` puts the ends of a text around it."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=options["unk_token"]))
    words.pre_tokenizer = split or WhitespaceSplit()
    if ends is not None:
        words.post_processor = ends
    return PreTrainedTokenizerFast(tokenizer_object=words, **options)


def make_bert(directory: Path, *, seed: int = 0, layers: int = 2) -> Path:
    """A headless BERT with random weights and its tokenizer, as `from_pretrained` expects them."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=32, **sizes)
    directory.mkdir(parents=True, exist_ok=True)
    BertModel(config).save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    BertTokenizer.from_pretrained(directory).save_pretrained(directory)
    return directory


def review(rng: random.Random, good: bool) -> str:
    words = rng.choices(PLAIN, k=rng.randint(3, 8)) + rng.choices(GOOD if good else BAD, k=2)
    rng.shuffle(words)
    return " ".join(words)


def make_reviews(file: Path, *, rows: int = 200, films: int = 20, seed: int = 0) -> Path:
    """A CSV of reviews whose label a bag of words gives away."""
    rng = random.Random(seed)
    with file.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["text", "label", "film"])
        for row in range(rows):
            good = rng.random() < 0.5
            writer.writerow([review(rng, good), "fresh" if good else "rotten", f"film {row % films}"])
    return file


def config_text(bert: Path, reviews: Path, *, name: str = "tiny", epochs: int = 6) -> str:
    """A run over the two, as a user would write it."""
    return f"""
name: {name}
seed_everything: 7
trainer:
  max_epochs: {epochs}
  accelerator: cpu
  enable_progress_bar: false
model:
  backbone:
    class_path: lora_lightning.huggingface
    init_args: {{pretrained_model_name_or_path: {bert}}}
  lora: {{r: 4, modules_to_save: [classifier]}}
  task: {{class_path: lora_lightning.SequenceClassification}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01}}}}
  lr_scheduler: {{class_path: lora_lightning.WarmupDecay}}
data:
  class_path: lora_lightning.TextClassificationData
  init_args:
    path: {reviews}
    tokenizer: {bert}
    split: {{validation: 0.2, test: 0.2, group_by: film}}
    batch_size: 16
"""
