"""A language model through the command: fit, validate, test, predict and export, on a .txt and on a JSONL."""

import json
import math

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_lightning.cli.main import LoRACLI
from tests.tiny_lm import make_lm, make_texts


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_lm(tmp_path_factory.mktemp("lm") / "llama", initializer_range=0.1)


def write(folder, kind, texts):
    path = folder / f"texts.{kind}"
    path.write_text("\n".join(texts if kind == "txt" else [json.dumps({"body": text}) for text in texts]) + "\n")
    return path


def config(folder, llama, path, **data):
    """A run as a user would write it."""
    column = {} if path.suffix == ".txt" else {"text_column": "body"}
    settings = {
        "name": "lm",
        "runs_dir": str(folder / "runs"),
        "seed_everything": 7,
        "trainer": {
            "max_epochs": 3,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "lora_lightning.MeasureBefore"}],
        },
        "model": {
            "backbone": {
                "class_path": "lora_lightning.huggingface",
                "init_args": {"pretrained_model_name_or_path": str(llama), "auto_class": "AutoModelForCausalLM"},
            },
            "lora": {"r": 8},
            "task": {"class_path": "lora_lightning.tasks.language_model.CausalLM"},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}},
        },
        "data": {
            "class_path": "lora_lightning.data.language_modelling.LanguageModellingData",
            "init_args": {"path": str(path), "tokenizer": str(llama), "max_length": 32, **column, **data},
        },
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return str(file)


TEXTS = make_texts(120, longest=20)


def fit(tmp_path, llama, kind, packing):
    """The folder of a run."""
    LoRACLI(args=["fit", "--config", config(tmp_path, llama, write(tmp_path, kind, TEXTS), packing=packing)])
    return tmp_path / "runs" / "lm" / "version_0"


def test_a_fit_tells_perplexity_before_and_after(tmp_path, llama, capsys):
    report = json.loads((fit(tmp_path, llama, "txt", True) / "report.json").read_text())
    assert report["val_perplexity"] < 0.6 * report["val_perplexity_before"]
    assert report["val_perplexity"] == pytest.approx(math.exp(report["val_loss"]), rel=1e-5)
    assert 0 <= report["val_token_accuracy"] <= 1
    assert report["w0_unchanged"]
    shown = capsys.readouterr().out
    assert f"before training: loss {report['val_loss_before']:.4f}" in shown
    assert f"{report['val_perplexity']:.4f} ({report['val_perplexity_before']:.4f} before)" in shown


@pytest.mark.slow  # the parser of each command takes seconds
@pytest.mark.parametrize(("kind", "packing"), [("txt", True), ("jsonl", False)])
def test_every_command_works_on_the_run(tmp_path, llama, kind, packing):
    folder = fit(tmp_path, llama, kind, packing)
    report = json.loads((folder / "report.json").read_text())
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
