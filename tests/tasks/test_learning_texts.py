"""What docs/results.md says of texts: sentences are written from attributes that never stood together in training."""

import lightning
import pytest
import torch

from lora_lightning import LoRAConfig, LoRAModule, huggingface
from lora_lightning.data.io.splits import SplitConfig
from lora_lightning.data.seq2seq import PromptCompletionData, SequenceToSequenceData
from lora_lightning.tasks.generation import SequenceToSequence, TextGeneration
from tests.data.files import write
from tests.tiny_text import make_model, restaurants

pytestmark = pytest.mark.slow
HELD_OUT = ("Zizzi | food : Indian", "Cotto | food : French", "Strada | food : English")


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
    parts = {"train": [row for row in rows if row not in held_out], "val": held_out}
    files = {split: str(write(tmp_path / f"{split}.jsonl", part)) for split, part in parts.items()}
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
    quiet = dict.fromkeys(("enable_progress_bar", "enable_checkpointing", "enable_model_summary", "logger"), False)
    trainer = lightning.Trainer(max_epochs=8, accelerator="cpu", check_val_every_n_epoch=8, **quiet)
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    (after,) = trainer.validate(module, data, verbose=False)
    assert before["val/bleu"] < 0.05
    assert after["val/bleu"] > 0.9
    assert after["val/exact_match"] > 0.8
