"""A language model through the command: fit, validate, test, predict and export, on a .txt and on a JSONL."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_lightning.cli.main import LoRACLI
from tests.tiny_lm import make_lm, make_texts

TEXTS = make_texts(120, longest=20)
CONFIG = """
name: lm
seed_everything: 7
trainer:
  max_epochs: 3
  accelerator: cpu
  enable_progress_bar: false
  callbacks: [{{class_path: lora_lightning.MeasureBefore}}]
model:
  backbone:
    class_path: lora_lightning.huggingface
    init_args: {{pretrained_model_name_or_path: {llama}, auto_class: AutoModelForCausalLM}}
  lora: {{r: 8}}
  task: {{class_path: lora_lightning.tasks.language_model.CausalLM}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.02}}}}
data:
  class_path: lora_lightning.data.language_modelling.LanguageModellingData
  init_args: {{path: {texts}, tokenizer: {llama}, max_length: 32, {more}}}
"""


def fit(folder, kind):
    """A packed run on plain texts or one on a JSONL; returns its folder and what it reports."""
    llama, texts = make_lm(folder / "llama", initializer_range=0.1), folder / f"texts.{kind}"
    rows = TEXTS if kind == "txt" else [json.dumps({"body": text}) for text in TEXTS]
    texts.write_text("\n".join(rows) + "\n")
    more = "packing: true" if kind == "txt" else "packing: false, text_column: body"
    (folder / "run.yaml").write_text(CONFIG.format(llama=llama, texts=texts, more=more))
    LoRACLI(args=["fit", "--config", str(folder / "run.yaml"), "--runs_dir", str(folder / "runs")])
    run = folder / "runs" / "lm" / "version_0"
    return run, json.loads((run / "report.json").read_text())


def test_a_fit_tells_perplexity_before_and_after(tmp_path, capsys):
    _, report = fit(tmp_path, "txt")
    assert report["val_perplexity"] < 0.6 * report["val_perplexity_before"]
    assert report["val_perplexity"] == pytest.approx(math.exp(report["val_loss"]), rel=1e-5)
    assert 0 <= report["val_token_accuracy"] <= 1
    assert report["w0_unchanged"]
    shown = capsys.readouterr().out
    assert f"before training: loss {report['val_loss_before']:.4f}" in shown
    assert f"{report['val_perplexity']:.4f} ({report['val_perplexity_before']:.4f} before)" in shown


@pytest.mark.slow  # the parser of each command takes seconds
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_every_command_works_on_the_run(tmp_path, kind):
    folder, report = fit(tmp_path, kind)
    for command in ("validate", "test", "predict", "export"):
        LoRACLI(args=[command, "--ckpt_path", str(folder)])
    assert json.loads((folder / "report.json").read_text())["test_perplexity"] < report["val_perplexity_before"]
    adapter = json.loads((folder / "export" / "adapter" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "CAUSAL_LM"
    merged = AutoModelForCausalLM.from_pretrained(folder / "export" / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "export" / "merged")
    predicted = [json.loads(line) for line in (folder / "predict" / "predictions.jsonl").read_text().splitlines()]
    assert len(predicted) == 12
    for row in predicted:
        ids = torch.tensor([[*tokenizer(TEXTS[row["document"] - 1])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            loss = float(merged(ids, labels=ids).loss)
        assert row["tokens"] == ids.shape[1] - 1
        assert row["loss"] == pytest.approx(loss, rel=1e-3)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]), rel=1e-5)
