"""Preference tuning through the whole command: fit, validate, test, predict, export."""

import json

import pytest

from lora_lightning.cli import LoRACLI
from tests.tiny_pairs import make_llama, preferences, write_rows

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
  task: {{class_path: lora_lightning.tasks.preference.PreferenceTuning, init_args: {{beta: 0.5}}}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.02}}}}
data:
  class_path: lora_lightning.data.preference.PreferenceData
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
