"""Answers before and after, by a run of the command over a tiny Llama and a file of conversations."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_lightning import LoRAModule, huggingface
from lora_lightning.cli.main import LoRACLI
from lora_lightning.data.chat.data import ChatData
from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.language_model import CausalLM
from lora_lightning.training.callbacks.generation_samples import Samples, stop_tokens
from tests.chats import CHATML, make_llama, write_chats

CONFIG = """
name: chat
seed_everything: 7
trainer:
  max_epochs: 6
  accelerator: cpu
  enable_progress_bar: false
  callbacks:
    - class_path: lora_lightning.MeasureBefore
    - class_path: lora_lightning.training.callbacks.generation_samples.Samples
      init_args: {{count: 3, max_new_tokens: 8}}
model:
  backbone:
    class_path: lora_lightning.huggingface
    init_args: {{pretrained_model_name_or_path: {llama}, auto_class: AutoModelForCausalLM}}
  lora: {{r: 16, modules_to_save: [lm_head]}}
  task: {{class_path: lora_lightning.tasks.language_model.CausalLM}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.005}}}}
data:
  class_path: lora_lightning.data.chat.data.ChatData
  init_args:
    path: {chats}
    tokenizer: {llama}
    max_length: 64
    batch_size: 16
    packing: {packing}
"""


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    llama, chats = make_llama(folder / "llama"), write_chats(folder / "chats.jsonl", rows=200)
    config = folder / "run.yaml"
    config.write_text(CONFIG.format(llama=llama, chats=chats, packing="false"))
    return SimpleNamespace(folder=folder, llama=str(llama), chats=str(chats), config=str(config))


@pytest.fixture(scope="module")
def fitted(chat):
    LoRACLI(args=["fit", "--config", chat.config, "--runs_dir", str(chat.folder / "runs")])
    return chat.folder / "runs" / "chat" / "version_0"


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_chat_run_learns_its_answers_and_writes_them_and_its_perplexity_down(fitted):
    samples = lines(fitted / "samples.jsonl")
    assert len(samples) == 6 * 3
    assert sorted({sample["step"] for sample in samples}) == [10, 20, 30, 40, 50, 60]
    assert all(sample["before"] != sample["reference"] for sample in samples)
    assert [sample["after"] for sample in samples[-3:]] == [sample["reference"] for sample in samples[-3:]]
    page = (fitted / "samples.md").read_text()
    assert page.startswith("After 60 steps:\n\n| prompt |")
    report = json.loads((fitted / "report.json").read_text())
    assert report["val_perplexity"] < 0.6 * report["val_perplexity_before"]
    assert report["val_perplexity"] == pytest.approx(math.exp(report["val_loss"]), rel=1e-5)


def test_a_fit_that_goes_on_keeps_what_was_answered_before(fitted, chat, tmp_path):
    shutil.copytree(fitted, tmp_path / "runs" / "chat" / "version_0")
    before = lines(fitted / "samples.jsonl")
    LoRACLI(args=["fit", "--config", chat.config, "--trainer.max_epochs", "7", "--ckpt_path", "last"])
    after = lines(tmp_path / "runs" / "chat" / "version_0" / "samples.jsonl")
    assert after[: len(before)] == before
    assert [sample["step"] for sample in after[len(before) :]] == [70] * 3
    assert {s["prompt"]: s["before"] for s in after} == {s["prompt"]: s["before"] for s in before}


def answer(folder, prompt):
    """Said by transformers alone, on the prompt as the model's own chat template writes it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_before_is_the_plain_models_own_answer_and_after_the_exports(fitted, chat, tmp_path):
    LoRACLI(args=["export", "--ckpt_path", str(fitted), "--output_dir", str(tmp_path / "out")])
    sample = next(s for s in lines(fitted / "samples.jsonl")[-3:] if not s["prompt"].startswith("user:"))
    assert answer(chat.llama, sample["prompt"]) == sample["before"]
    assert answer(tmp_path / "out" / "merged", sample["prompt"]) == sample["reference"]


def test_new_questions_are_answered_by_predict(fitted, tmp_path):
    asked = [{"messages": [{"role": "user", "content": f"Say {word}."}]} for word in ("sea", "sun", "sky")]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    task = ["--model.task", "lora_lightning.TextGeneration", "--model.task.init_args.generation.max_new_tokens", "8"]
    data = ["--data.init_args.path", f"{{predict: {tmp_path / 'new.jsonl'}}}", "--data.init_args.with_prompts", "true"]
    LoRACLI(args=["predict", "--ckpt_path", str(fitted), *task, *data])
    assert [row["prediction"] for row in lines(fitted / "predict" / "predictions.jsonl")] == ["sea", "sun", "sky"]


@pytest.mark.slow
def test_a_packed_run_learns_the_same_and_wandb_gets_its_table(chat, tmp_path):
    config = tmp_path / "packed.yaml"
    config.write_text(CONFIG.format(llama=chat.llama, chats=chat.chats, packing="true"))
    rows = ["--data.init_args.batch_size", "4", "--trainer.max_epochs", "3"]
    logger = ["--trainer.logger", "lora_lightning.WandbLogger", "--trainer.logger.save_dir", str(tmp_path / "runs")]
    LoRACLI(args=["fit", "--config", str(config), *rows, *logger])
    table = next((tmp_path / "runs" / "wandb").glob("offline-run-*/files/media/table/samples_*.table.json"))
    content = json.loads(table.read_text())
    assert content["columns"] == ["step", "prompt", "reference", "before", "after"]
    assert len(content["data"]) == 3
    cli = LoRACLI(args=["test", "--ckpt_path", "runs/chat"])
    assert float(cli.trainer.callback_metrics["test/perplexity"]) < 3
    LoRACLI(args=["predict", "--ckpt_path", "runs/chat"])
    assert len(lines(tmp_path / "runs/chat/version_0/predict/predictions.jsonl")) == 20


def test_an_answer_stops_at_its_turns_end_whatever_the_model_says(chat, tmp_path):
    """The model's own config knows another end."""
    folder = str(make_llama(tmp_path / "other", CHATML, end="</s>"))
    backbone = huggingface(folder, auto_class="AutoModelForCausalLM")
    for train_on in ("answers", "all"):
        data = ChatData(chat.chats, folder, max_length=64, train_on=train_on)
        data.setup()
        ends = data.tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
        assert stop_tokens(backbone, data) == sorted(ends)


def test_what_it_cannot_do_is_said_before_the_fit(chat, make_module, make_data):
    trainer = SimpleNamespace(datamodule=make_data())
    with pytest.raises(LoRAError, match="a transformers model that generates"):
        Samples().setup(trainer, make_module(), "fit")
    backbone = huggingface(chat.llama, auto_class="AutoModelForCausalLM")
    module = LoRAModule(backbone, CausalLM())
    with pytest.raises(LoRAError, match="takes its prompts from ChatData"):
        Samples().setup(trainer, module, "fit")
