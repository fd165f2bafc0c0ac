"""Pairs and plain sets through the whole command: fit, validate, test, predict, export."""

import json

import pytest

from lora_lightning.cli.main import LoRACLI
from tests.tiny import BAD, GOOD, PLAIN, make_bert
from tests.tiny_pairs import make_llama, preferences, write_rows

pytestmark = pytest.mark.slow  # the parser of each command takes a second or two

COMMON = """
seed_everything: 7
trainer: {{max_epochs: {epochs}, accelerator: cpu, enable_progress_bar: false, log_every_n_steps: 4}}
"""

PREFERENCE = """
name: preference
model:
  backbone:
    class_path: lora_lightning.huggingface
    init_args: {{pretrained_model_name_or_path: {model}, auto_class: AutoModelForCausalLM}}
  lora: {{r: 4}}
  task: {{class_path: lora_lightning.PreferenceTuning, init_args: {{beta: 0.5}}}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.02}}}}
data:
  class_path: lora_lightning.PreferenceData
  init_args:
    path: {path}
    tokenizer: {model}
    as_chat: true
    batch_size: 16
    split: {{validation: 0.25, test: 0.25}}
"""


def run_all(config, folder, epochs):
    """Every command in turn. Returns fit's and test's own figures, the predictions and the report."""
    file = folder / "run.yaml"
    file.write_text(COMMON.format(epochs=epochs) + config)
    fitted = LoRACLI(args=["fit", "--config", str(file)])
    folder = next((folder / "runs").iterdir()) / "version_0"
    seen = {**{k: float(v) for k, v in fitted.trainer.callback_metrics.items()}}
    for command in ("validate", "test", "predict"):
        cli = LoRACLI(args=[command, "--ckpt_path", str(folder)])
        seen |= {k: float(v) for k, v in cli.trainer.callback_metrics.items()}
    LoRACLI(args=["export", "--ckpt_path", str(folder)])
    report = json.loads((folder / "report.json").read_text())
    assert report["w0_unchanged"]
    assert report["export_max_rel_diff"] < 1e-5
    written = [json.loads(line) for line in next(folder.rglob("predictions.jsonl")).read_text().splitlines()]
    assert [row["row"] for row in written] == list(range(len(written)))
    return seen, written, report, folder


def test_a_preference_run_from_fit_to_export(tmp_path):
    llama, pairs = make_llama(tmp_path / "llama"), write_rows(tmp_path / "pairs.jsonl", preferences(64))
    config = PREFERENCE.format(model=llama, path=pairs)
    seen, written, report, folder = run_all(config, tmp_path, epochs=6)
    assert seen["val/accuracy"] == seen["test/accuracy"] == 1.0
    assert seen["val/loss"] < 0.4, "log 2 before"
    assert seen["test/margin"] == pytest.approx(seen["test/chosen_reward"] - seen["test/rejected_reward"], rel=1e-4)
    assert len(written) == 16
    assert all(row["chosen_preferred"] and row["chosen_reward"] > row["rejected_reward"] for row in written)
    assert "val_margin" in report
    exported = json.loads((folder / "export/adapter/adapter_config.json").read_text())
    assert exported["task_type"] == "CAUSAL_LM"


CONTRASTIVE = """
name: contrastive
model:
  backbone:
    class_path: lora_lightning.huggingface
    init_args: {{pretrained_model_name_or_path: {model}, auto_class: AutoModel}}
  lora: {{r: 4, exclude_modules: [pooler.dense]}}
  task: {{class_path: lora_lightning.ContrastiveEmbedding}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.02}}}}
data:
  class_path: lora_lightning.PairData
  init_args:
    path: {path}
    tokenizer: {model}
    batch_size: 16
    eval_batch_size: 5
    split: {{validation: 0.25, test: 0.25}}
"""


def test_a_contrastive_run_from_fit_to_export(tmp_path):
    bert = make_bert(tmp_path / "bert")
    rows = [
        {"anchor": f"{a} film {p} story", "positive": f"the {p} end is {a}"}
        for a in GOOD + BAD
        for p in PLAIN
        if a != p
    ]
    config = CONTRASTIVE.format(model=bert, path=write_rows(tmp_path / "pairs.jsonl", rows))
    seen, written, report, folder = run_all(config, tmp_path, epochs=4)
    assert seen["val/recall@5"] > 0.5, "of 28 candidates"
    assert {"test/loss", "test/mrr", "test/recall@1"} <= set(seen)
    assert {"val_mrr", "val_recall@1"} <= set(report)
    assert len(written) == 28
    assert len(written[0]["embedding"]) == len(written[0]["positive_embedding"]) == 32
    assert sum(x * x for x in written[0]["embedding"]) == pytest.approx(1, rel=1e-5)
    exported = json.loads((folder / "export/adapter/adapter_config.json").read_text())
    assert exported["task_type"] == "FEATURE_EXTRACTION"


SUPERVISED = """
name: supervised
model:
  backbone: {{class_path: torchvision.ops.MLP, init_args: {{in_channels: 4, hidden_channels: [16, 1]}}}}
  lora: {{r: 1, target_modules: all-linear, modules_to_save: ["3"]}}
  task:
    class_path: lora_lightning.Supervised
    init_args:
      loss: {{class_path: torch.nn.HuberLoss}}
      metrics:
        mae: {{class_path: torchmetrics.MeanAbsoluteError}}
        r2: {{class_path: torchmetrics.R2Score}}
      monitor: mae
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.02}}}}
data:
  class_path: lora_lightning.DatasetData
  init_args:
    train: {{class_path: tests.command.numbers.Sums, init_args: {{count: 128}}}}
    validation: {{class_path: tests.command.numbers.Sums, init_args: {{count: 40, seed: 1}}}}
    test: {{class_path: tests.command.numbers.Sums, init_args: {{count: 40, seed: 2}}}}
    batch_size: 16
"""


def test_a_supervised_run_on_tuples_from_fit_to_export(tmp_path):
    seen, written, report, folder = run_all(SUPERVISED.format(), tmp_path, epochs=8)
    assert seen["val/mae"] < 0.6, "1.6 at the start"
    assert {"test/loss", "test/mae", "test/r2"} <= set(seen)
    assert len(written) == 40
    assert len(written[0]["prediction"]) == 1
    assert report["val_mae"] == pytest.approx(seen["val/mae"], rel=1e-4)
    assert (folder / "export/merged/model.safetensors").is_file()
