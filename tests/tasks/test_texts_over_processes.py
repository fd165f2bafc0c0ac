"""Law 9 of taggers and writers: two processes find what one does, to the rounding of sums, with no row seen twice.

The other one is run as `python -m tests.tasks.test_texts_over_processes FOLDER 2`: what torch has started must not be
forked.
"""

import json
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch

from lora_lightning import LoRAConfig, LoRAModule, huggingface
from lora_lightning.data.chat.prompt_completion import PromptCompletionData
from lora_lightning.data.seq2seq import SequenceToSequenceData
from lora_lightning.data.token_classification import TokenClassificationData
from lora_lightning.tasks.generation import SequenceToSequence, TextGeneration
from lora_lightning.tasks.token_classification import TokenClassification
from tests.command.process import REPOSITORY
from tests.data.files import ALL
from tests.tiny_text import make_model, make_tagger, restaurants, sentences, write_rows

WRITTEN = {
    "generation": {"max_new_tokens": 6, "num_beams": 2},
    "metrics": ("bleu", "chrf", "ter", "rouge1", "rougeL", "exact_match"),
}


def fits(folder):
    tags, texts = ({s: str(folder / name) for s in ("train", "validation")} for name in ("tags.jsonl", "texts.jsonl"))
    options = {"batch_size": 2, "split": ALL}
    tagged = TokenClassificationData(tags, str(folder / "tagger"), **options)
    columns = {"source_column": "context", "target_column": "completion"}
    pairs = SequenceToSequenceData(texts, str(folder / "t5"), **columns, **options)
    prompts = PromptCompletionData(texts, str(folder / "gpt2"), prompt="{context} </s>", **options)
    return {
        "tagger": ("TokenClassification", TokenClassification(tagged.label_names), tagged),
        "t5": ("Seq2SeqLM", SequenceToSequence(pairs.tokenizer, **WRITTEN), pairs),
        "gpt2": ("CausalLM", TextGeneration(prompts.tokenizer, **WRITTEN), prompts),
    }


def figures(folder, devices):
    found = {}
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    for kind, (auto, task, data) in fits(folder).items():
        torch.manual_seed(0)
        labels = {"num_labels": 5} if kind == "tagger" else {}
        backbone = huggingface(str(folder / kind), auto_class=f"AutoModelFor{auto}", **labels)
        module = LoRAModule(backbone, task, LoRAConfig(r=2))
        for name, parameter in module.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter)
        given = {"accelerator": "cpu", "devices": devices, "precision": "64-true", **dict.fromkeys(quiet, False)}
        trainer = lightning.Trainer(strategy="ddp_fork" if devices > 1 else "auto", **given)
        trainer.validate(module, data, verbose=False)
        found[kind] = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return found


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path):
    make_tagger(tmp_path / "tagger")
    for kind in ("t5", "gpt2"):
        make_model(kind, tmp_path / kind)
    write_rows(tmp_path / "tags.jsonl", sentences(13))
    write_rows(tmp_path / "texts.jsonl", restaurants(13))
    command = [sys.executable, "-m", __name__, str(tmp_path), "2"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    two, one = json.loads((tmp_path / "figures.json").read_text()), figures(tmp_path, 1)
    for kind in one:
        assert two[kind] == pytest.approx(one[kind], rel=1e-6), kind
        assert {"val/loss", "val/accuracy" if kind == "tagger" else "val/bleu"} <= set(one[kind])


if __name__ == "__main__":
    where = Path(sys.argv[1])
    (where / "figures.json").write_text(json.dumps(figures(where, int(sys.argv[2]))))
